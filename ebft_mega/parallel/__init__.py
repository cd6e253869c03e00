"""Process groups, pipeline schedules, and the engines that train a stage at any ZeRO stage."""
