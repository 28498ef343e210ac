"""The suite `exactness`."""
