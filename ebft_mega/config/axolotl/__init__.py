"""What axolotl's keys mean here, and a whole file of axolotl as a configuration of this trainer."""
