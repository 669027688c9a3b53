"""Sums over calibration tokens: collected, added up over devices and batches, and their means by layer and expert."""
