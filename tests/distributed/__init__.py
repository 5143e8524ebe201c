"""Trainings of several processes, started by the launchers that users start them with."""
