"""Read files of servers: limits of size and time, attempts with waits, redirects. Stores are made of these."""
