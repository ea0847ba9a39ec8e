from tutelage.components.core.launch import main

main("policy_optimization")
