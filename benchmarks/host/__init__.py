"""What a step costs the host beside its forwards."""
