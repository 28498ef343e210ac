"""The same steps by other packages."""
