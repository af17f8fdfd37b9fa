"""What an engine is: contract, tensor specs, bundle and backends."""
