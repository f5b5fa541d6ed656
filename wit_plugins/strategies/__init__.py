"""Built-in strategies. Each is an ordinary plugin, registered by name like anyone else's."""
