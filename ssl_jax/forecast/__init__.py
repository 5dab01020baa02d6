"""What a run will need, before it is paid for: memory, time, programs compiled for machines that are not here."""
