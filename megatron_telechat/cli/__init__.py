"""Arguments, reports and exit codes behind the doors."""
