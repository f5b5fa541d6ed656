"""What a strategy or an adapter implements, and the strategies of one run."""
