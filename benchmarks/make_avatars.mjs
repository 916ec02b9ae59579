// Draws the data set `avatars`: 12,000 faces of 16 x 16 pixels as one file of raw RGB bytes, row by row.
//
//     npm install @dicebear/core@9.4.3 @dicebear/pixel-art@9.4.3 @resvg/resvg-js@2.6.2
//     node benchmarks/make_avatars.mjs faces.rgb [count] [prefix]
//     python benchmarks/pack_avatars.py faces.rgb
//
// The design is "Pixel Art" by DiceBear (https://www.dicebear.com), CC0 1.0: anybody may copy and change it for any purpose.
// Face number i is the one of the seed "s<i>"; another prefix gives faces that the data set does not hold.

import { openSync, writeSync, closeSync } from 'node:fs';
import { createAvatar } from '@dicebear/core';
import * as pixelArt from '@dicebear/pixel-art';
import { Resvg } from '@resvg/resvg-js';

const SIDE = 16;
const GROUNDS = ['b6e3f4', 'c0aede', 'd1d4f9', 'ffd5dc', 'ffdfbf'];
const [out, count = '12000', prefix = 's'] = process.argv.slice(2);

function face(seed) {
  const drawing = createAvatar(pixelArt, { seed, size: SIDE, backgroundColor: GROUNDS }).toString();
  const { pixels } = new Resvg(drawing, { fitTo: { mode: 'width', value: SIDE } }).render();
  return Buffer.from(pixels.filter((_, index) => index % 4 !== 3)); // the grounds are opaque: alpha is 255 throughout
}

const file = openSync(out, 'w');
for (let index = 0; index < Number(count); index++) writeSync(file, face(`${prefix}${index}`));
closeSync(file);
