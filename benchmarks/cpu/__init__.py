"""Speed on CPUs, in fp32 and in integers."""
