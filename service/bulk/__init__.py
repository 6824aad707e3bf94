"""Files in, shards of answers out: the engine of the service without its HTTP, on Ray Data."""
