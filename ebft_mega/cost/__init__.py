"""What a step costs, in exact counts: rows, query-key pairs and floating-point operations. No torch."""
