"""Which batch comes next, and from which random numbers it is made. Nothing here touches a disk."""
