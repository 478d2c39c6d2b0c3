"""The server as several replicas behind one gateway, on the machines of a Ray cluster."""
