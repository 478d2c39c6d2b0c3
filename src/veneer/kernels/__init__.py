"""Room 0: functions of tensors, each with a plain reference beside it and chosen in one place."""
