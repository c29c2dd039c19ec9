"""How model.ckpt-7.* here were made, once: by TensorFlow 2.21's own Saver (pip install tensorflow-cpu==2.21.0).

Names and shapes are those of EleutherAI's GPT-Neo (Mesh-TensorFlow), the values simple fractions that bfloat16
holds; test_originals.py computes them anew.  Two devices make two shards.  Layer 1 is stored in bfloat16.
"""

import sys

import numpy as np

C, V, P = 8, 64, 16                                        # the config says n_vocab 60: four rows are padding
SHAPES = {"wte": (V, C), "wpe": (P, C), "ln_f/g": (C,), "ln_f/b": (C,)}
for layer in ("h0", "h1"):
    SHAPES |= {f"{layer}/{name}": shape for name, shape in {
        "norm_1/g": (C,), "norm_1/b": (C,), "norm_2/g": (C,), "norm_2/b": (C,),
        "attn/q": (C, C), "attn/k": (C, C), "attn/v": (C, C), "attn/o": (C, C),
        "attn/compute_output_bias/o_b": (C,),
        "mlp/conv1d_main/c_fc/kernel": (C, 4 * C), "mlp/conv1d_main/c_fc/bias": (4 * C,),
        "mlp/conv1d_main/c_proj/kernel": (4 * C, C), "mlp/conv1d_main/c_proj/bias": (C,)}.items()}


def values(number, shape):
    """The number-th variable's values."""
    i = np.arange(np.prod(shape)).reshape(shape)
    return ((i * 7 + number * 13) % 257 - 128) / 64


if __name__ == "__main__":
    import tensorflow.compat.v1 as tf
    tf.disable_eager_execution()
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0],
                                               [tf.config.LogicalDeviceConfiguration()] * 2)
    tf.train.create_global_step()
    for number, (name, shape) in enumerate(SHAPES.items()):
        dtype = tf.bfloat16 if name.startswith("h1/") else tf.float32
        with tf.device(f"/cpu:{number % 2}"):
            tf.get_variable(f"gpt2/{name}", initializer=tf.cast(values(number, shape), dtype), dtype=dtype)
    with tf.device("/cpu:0"):
        tf.get_variable("gpt2/wpe/adam_m", initializer=tf.zeros((P, C)))
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        tf.train.Saver(sharded=True).save(session, f"{sys.argv[1]}/model.ckpt", global_step=7, write_meta_graph=False)
