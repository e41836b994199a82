"""Real training runs in processes of their own, to be killed and compared."""
