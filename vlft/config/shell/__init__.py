"""Read a shell script without executing it: which commands would it run, with which words and variables?

`words` splits text into tokens, `syntax` groups them into statements, `expand` replaces variables, `conditions` decides
tests, and `walk` follows the statements. Nothing is executed, and no environment is read: a value that the script does
not contain becomes a placeholder such as `<MODEL>`, with the reason. `vlft.config.migrate` reads the commands.
"""
