"""Prediction in float32: what is compared with a reference of that precision."""

from functools import partial

import napari_unet
from napari_unet.inference import engine
from napari_unet.inference import predict as predicting
from napari_unet.inference import segment as segmenting

predict = partial(napari_unet.predict, precision="float32")
segment = partial(napari_unet.segment, precision="float32")
predict_steps = partial(predicting.predict_steps, precision="float32")
segment_steps = partial(segmenting.segment_steps, precision="float32")
Predictor = partial(engine.Predictor, precision="float32")
