"""The report of a job: one page, report.html, and the model card README.md, from what the stages left on the volume.

stages call reporting.leave_report() at their end; publish sends the same two files with the model. evidence.py reads,
charts.py draws, page.py and card.py render. Nothing here decides anything, and no stage fails for want of its report.
"""
