"""The routing policy: pure functions over plain values. Standard library only, no I/O, no clock."""
