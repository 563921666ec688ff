//! Kernels of one's own on a CUDA device: arguments arrive as they were given, and errors show where the
//! documentation says. `test_support` says what becomes of them where there is no such device.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use cubecl::client::Client;
use cuda_source::{
    Arguments, CudaDevice, LaunchError, Source, Swizzle, TensorElement, TensorMap2d, device, launch,
    leave_multiprocessors,
};

const FILE: &str = include_str!("kernels.cu");
const BOX_ROWS: usize = 32;
/// 96 KB.
const LARGE_WORDS: usize = 24 << 10;

fn source(name: &'static str, cube_dim: u32) -> Source {
    let defines = [("BOX_BYTES", (BOX_ROWS * 128) as i64), ("LARGE_WORDS", LARGE_WORDS as i64)];
    // The kernel with much shared memory may not load, so it is in no other kernel's text.
    let (rest, large) = FILE.split_at(FILE.find("// More static").unwrap());
    let text = if name == "large_tile" { large } else { rest };
    Source::with_defines(text, name, cube_dim, &defines)
}

fn cuda() -> Option<(&'static Client, CudaDevice)> {
    let client = test_support::cuda(|client| device(client).is_some())?;
    Some((client, device(client).expect("a CUDA device of this decade, with NVRTC")))
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Scalars {
    n: u64,
    factor: f32,
    offset: i32,
    divisor: f64,
    flag: u8,
    padding: [u8; 7],
}

const SCALARS: Scalars = Scalars { n: 100, factor: 3.0, offset: -7, divisor: 2.0, flag: 1, padding: [0; 7] };

fn floats(n: usize) -> Vec<f32> {
    (0..n).map(|i| i as f32 - 20.0).collect()
}

#[test]
fn the_device_is_described() {
    let Some((client, device)) = cuda() else { return };
    eprintln!("{}: {device:?}", client.properties().identity.name);
    assert!(device.compute_capability >= (7, 0) && device.compute_capability.1 < 10);
    assert_eq!(Some(device.multiprocessors), client.properties().hardware.num_streaming_multiprocessors);
    assert!((1 << 20..1 << 30).contains(&device.l2_bytes));
    assert!(device.toolkit >= (12, 0) && device.driver >= (12, 0));
    assert_eq!(cuda_source::device(client), Some(device));
    // What two leave to others counts together, until each is done.
    let now = || cuda_source::device(client).map(|now| device.multiprocessors - now.multiprocessors);
    let (first, second) = (leave_multiprocessors(client, 4), leave_multiprocessors(client, 3));
    assert_eq!(now(), Some(7));
    drop(first);
    assert_eq!(now(), Some(3));
    drop(second);
    assert_eq!(cuda_source::device(client), Some(device));
}

#[test]
fn buffers_with_offsets_and_scalars_of_every_size_arrive() {
    let Some((client, _)) = cuda() else { return };
    // 64 floats before and behind what the kernel may touch.
    let x = client.create_from_slice(bytemuck::cast_slice(&floats(228)));
    let y = client.create_from_slice(bytemuck::cast_slice(&[f32::MAX; 228]));
    let part = |handle: &cubecl::server::Handle| handle.clone().offset_start(256).offset_end(256);
    for (flag, expected) in [(1, (|x| x * 3.0 / 2.0 - 7.0) as fn(f32) -> f32), (0, |x| x)] {
        let arguments = Arguments::new().read(&part(&x)).write(&part(&y)).params(Scalars { flag, ..SCALARS });
        launch(client, &source("affine", 64), (2, 1, 1), arguments).unwrap();
        let bytes = client.read_one(y.clone()).unwrap();
        let values: &[f32] = bytemuck::cast_slice(&bytes);
        let (before, rest) = values.split_at(64);
        let (written, behind) = rest.split_at(100);
        assert!(before.iter().chain(behind).all(|v| *v == f32::MAX), "wrote outside its output");
        assert_eq!(written, floats(228)[64..164].iter().map(|x| expected(*x)).collect::<Vec<_>>());
    }
}

#[test]
fn a_kernel_without_parameters_updates_in_place() {
    let Some((client, _)) = cuda() else { return };
    let x = client.create_from_slice(bytemuck::cast_slice(&floats(32)));
    for _ in 0..3 {
        launch(client, &source("increment", 32), (1, 1, 1), Arguments::new().read_write(&x)).unwrap();
    }
    let bytes = client.read_one(x).unwrap();
    let expected: Vec<f32> = floats(32).iter().map(|x| x + 3.0).collect();
    assert_eq!(bytemuck::cast_slice::<u8, f32>(&bytes), expected);
}

/// A matrix of 16-bit numbers with padded rows, loaded box by box: inside, over both edges, swizzled or not.
#[test]
fn boxes_arrive_swizzled_and_filled_with_zeros() {
    let Some((client, device)) = cuda() else { return };
    if device.compute_capability < (9, 0) {
        test_support::skipped(format_args!("no TMA at compute capability {:?}", device.compute_capability));
        return;
    }
    let (rows, cols, row_stride, lead) = (100, 200, 208, 8);
    let data: Vec<u16> = (0..lead + rows * row_stride).map(|i| i as u16).collect();
    let matrix = client.create_from_slice(bytemuck::cast_slice(&data)).offset_start(2 * lead as u64);
    let at = |row: usize, col: usize| if row < rows && col < cols { data[lead + row * row_stride + col] } else { 0 };
    for (swizzle, span) in [(Swizzle::B128, 128), (Swizzle::B64, 64), (Swizzle::B32, 32), (Swizzle::None, 128)] {
        // The box always has 4 KB.
        let (box_cols, box_rows) = (span / 2, BOX_ROWS * 128 / span);
        let handle = matrix.clone();
        let element = TensorElement::BF16;
        let map = TensorMap2d { handle, rows, cols, row_stride, box_rows, box_cols, swizzle, element };
        for (row, col) in [(0, 0), (8, 64), (90, 0), (3, 184), (96, 192)] {
            let out = client.empty(BOX_ROWS * 128);
            let arguments = Arguments::new().tensor_map(map.clone()).write(&out).params([row as i32, col as i32]);
            launch(client, &source("load_box", 128), (1, 1, 1), arguments).unwrap();
            let bytes = client.read_one(out).unwrap();
            let loaded: &[u16] = bytemuck::cast_slice(&bytes);
            for r in 0..box_rows {
                for c in 0..box_cols {
                    let address = r * span + 2 * c;
                    // 16-byte chunks are xored with the number of the 128-byte line, within the span.
                    let swizzled = address ^ ((address >> 7) % (span / 16)) << 4;
                    let place = if swizzle == Swizzle::None { address } else { swizzled };
                    let (got, want) = (loaded[place / 2], at(row + r, col + c));
                    assert_eq!(got, want, "{swizzle:?}, box at {row}, {col}: element {r}, {c}");
                }
            }
        }
    }
}

#[test]
fn what_does_not_compile_fails_the_read_of_its_outputs() {
    let Some((client, _)) = cuda() else { return };
    let wrong =
        Source::new("wrong", 32, "extern \"C\" __global__ void wrong(const float* x, float* y) { y = not_there; }");
    let x = client.create_from_slice(bytemuck::cast_slice(&floats(32)));
    let y = client.create_from_slice(bytemuck::cast_slice(&floats(32)));
    launch(client, &wrong, (1, 1, 1), Arguments::new().read(&x).write(&y)).unwrap();
    for error in [client.check([&y]).unwrap_err().to_string(), client.read_one(y.clone()).unwrap_err().to_string()] {
        assert!(error.contains("not_there"), "the compiler's log is missing: {error}");
    }
    // What it would only have read is good, and the output is once another kernel has written it.
    assert_eq!(bytemuck::cast_slice::<u8, f32>(&client.read_one(x.clone()).unwrap()), floats(32));
    let arguments = Arguments::new().read(&x).write(&y).params(Scalars { n: 32, flag: 0, ..SCALARS });
    launch(client, &source("affine", 64), (1, 1, 1), arguments).unwrap();
    assert_eq!(bytemuck::cast_slice::<u8, f32>(&client.read_one(y).unwrap()), floats(32));
}

#[test]
fn counters_outlive_a_launch_that_did_not_run() {
    let Some((client, _)) = cuda() else { return };
    let x = client.create_from_slice(bytemuck::cast_slice(&[7_u32; 32]));
    let counters = cuda_source::counters(client, &x, 32);
    let spoiled = client.empty(128);
    let wrong =
        Source::new("wrong", 32, "extern \"C\" __global__ void wrong(float* y, unsigned* counters) { not_there; }");
    launch(client, &wrong, (1, 1, 1), Arguments::new().write(&spoiled).counters(&counters)).unwrap();
    client.check([&spoiled]).unwrap_err();
    let text = "extern \"C\" __global__ void count(unsigned* x, unsigned* counters) { x[threadIdx.x] += counters[threadIdx.x]; }";
    let again = cuda_source::counters(client, &x, 32);
    launch(client, &Source::new("count", 32, text), (1, 1, 1), Arguments::new().read_write(&x).counters(&again))
        .unwrap();
    assert_eq!(bytemuck::cast_slice::<u8, u32>(&client.read_one(x).unwrap()), [7; 32]);
}

#[test]
fn wrong_arguments_are_refused_before_the_launch() {
    let Some((client, _)) = cuda() else { return };
    let x = client.create_from_slice(bytemuck::cast_slice(&floats(32)));
    let refused = launch(client, &source("affine", 64), (1, 1, 1), Arguments::new().read(&x).write(&x));
    assert_eq!(refused, Err(LaunchError::Parameters { kernel: "affine", expected: 3, given: 2 }));
    let (rows, cols, row_stride) = (8, 16, 17);
    let (swizzle, element) = (Swizzle::None, TensorElement::U8);
    let handle = x.clone();
    let map = TensorMap2d { handle, rows, cols, row_stride, box_rows: 8, box_cols: 16, swizzle, element };
    let arguments = Arguments::new().tensor_map(map).write(&x).params([0_i32, 0]);
    let refused = launch(client, &source("load_box", 128), (1, 1, 1), arguments).unwrap_err();
    assert!(matches!(refused, LaunchError::TensorMap { index: 0, .. }), "{refused}");
}

/// Whether more than 48 KB of static shared memory works is the driver's business: if it does not, the
/// output must say so.
#[test]
fn much_static_shared_memory_works_or_fails_loudly() {
    let Some((client, device)) = cuda() else { return };
    let data: Vec<u32> = (0..LARGE_WORDS as u32).collect();
    let x = client.create_from_slice(bytemuck::cast_slice(&data));
    let y = client.create_from_slice(bytemuck::cast_slice(&data));
    launch(client, &source("large_tile", 256), (1, 1, 1), Arguments::new().read(&x).write(&y)).unwrap();
    match client.read_one(y) {
        Ok(bytes) => {
            eprintln!("{} KB of static shared memory: works with {device:?}", LARGE_WORDS >> 8);
            assert!(bytemuck::cast_slice::<u8, u32>(&bytes).iter().eq(data.iter().rev()));
        }
        Err(error) => {
            let error = error.to_string();
            let line = error.lines().next().unwrap_or_default();
            eprintln!("{} KB of static shared memory: refused with {device:?}: {line}", LARGE_WORDS >> 8);
        }
    }
}

#[test]
fn other_runtimes_refuse() {
    let Some(client) = test_support::client("wgpu") else { return };
    assert_eq!(device(client), None);
    let x = client.create_from_slice(bytemuck::cast_slice(&floats(32)));
    let refused = launch(client, &source("increment", 32), (1, 1, 1), Arguments::new().read_write(&x)).unwrap_err();
    assert!(matches!(refused, LaunchError::NotCuda { kernel: "increment", .. }), "{refused}");
}
