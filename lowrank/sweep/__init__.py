"""What ``-m`` is made of: jobs and their folders, the lanes in which they run, and what becomes of them."""
