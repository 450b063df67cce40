"""What a GPU that generates spends its time on, in Triton. Imported only where Triton is:
`kernels.device.runs_triton` says when. The torch code around each call is the reference.
"""
