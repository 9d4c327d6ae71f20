"""What ``rtap eval`` is made of: questions, the client of a running server, statistics, comparison, tables and plot."""
