from tutelage.components.core.launch import main

main("data_prep")
