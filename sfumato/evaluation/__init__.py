"""What is measured, and the report: functions of run folders."""
