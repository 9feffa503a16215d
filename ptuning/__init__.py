from ptuning import chatglm
chatglm.register()
