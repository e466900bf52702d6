"""A run that hangs or loses a rank ends, in one line that names the rank and its phase.

pulse is the rank's side: it says where it is. A guardian, a process of its own beside every rank,
reads that, whatever holds the rank's interpreter up. The guardians tell rank 0's, which judges.
Nothing here but watch knows torch.
"""
