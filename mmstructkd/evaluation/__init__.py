"""What a training gave, and what a network costs. Import from the modules: only ``cost`` needs the mm packages."""
