"""What MeZO-SVRG (arXiv 2404.08080) claims: less variance, and runs that converge faster."""
