"""What each verb of the command line does, by what it works on."""
