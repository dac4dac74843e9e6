"""KServe's protocol in front of pools: to its clients they are one server with the models of both stages."""
