//! Trains a decoder, quantizes it to 4 bits, fine-tunes LoRA adapters on other data with two optimizers, and saves them as PEFT does.
//!
//! `burn-transformer [FOLDER]`: the adapter goes to FOLDER, `runs/burn-transformer` if none is named.

#![expect(clippy::print_stdout, reason = "a program that tells how training goes")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Tensor};
use burn_transformer::{Transformer, batch};
use nf4_quant::QuantConfig;
use paged_optim::PagedAdamWConfig;
use qlora_layers::peft::save_adapter;
use qlora_layers::{LoraConfig, apply_lora};
use safetensors::tensor::{Dtype, View};

const ROWS: usize = 16;
const LEN: usize = 16;

fn main() -> Result<()> {
    let folder = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("runs/burn-transformer"), PathBuf::from);
    let device = Device::flex().autodiff();
    device.seed(0);

    // A model that somebody trained, here on one rule for the next token.
    let mut model = Transformer::init(&device);
    let mut optimizer = AdamWConfig::new().init();
    for step in 0..150 {
        let loss = model.loss(batch(0, step, ROWS, LEN, &device));
        report("training all weights", step, &loss);
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(3e-3, model, grads);
    }
    let dense = model.num_params();

    // Its linear layers in 4 bits, with adapters that learn another rule.
    let config = LoraConfig { rank: 8, alpha: 16.0, ..LoraConfig::default() };
    let adapted = apply_lora(model, &config, QuantConfig::default(), 0)?;
    println!("{dense} parameters; with 4-bit weights and adapters {} remain in 32 bits", adapted.num_params());

    // Burn's optimizer and ours differ in one line. Burn's defaults for epsilon and weight decay are not PyTorch's.
    let mut by_burn = adapted.clone();
    let mut optimizer = AdamWConfig::new().init();
    for step in 0..100 {
        let loss = by_burn.loss(batch(1, step, ROWS, LEN, &device));
        report("adapters, Burn's AdamW", step, &loss);
        let grads = GradientsParams::from_grads(loss.backward(), &by_burn);
        by_burn = optimizer.step(1e-2, by_burn, grads);
    }
    let mut by_paged = adapted;
    let mut optimizer = PagedAdamWConfig::new().with_epsilon(1e-5).with_weight_decay(1e-4).init_paged();
    for step in 0..100 {
        let loss = by_paged.loss(batch(1, step, ROWS, LEN, &device));
        report("adapters, paged AdamW", step, &loss);
        let grads = GradientsParams::from_grads(loss.backward(), &by_paged);
        by_paged = optimizer.step(1e-2, by_paged, grads);
    }

    save_adapter(&by_paged, &config, "burn-transformer", folder.join("adapter"))?;
    write_check(&by_paged, &folder, &device)?;
    println!("saved {}; check_with_peft.py loads it with PEFT", folder.join("adapter").display());
    Ok(())
}

fn report(what: &str, step: usize, loss: &Tensor<1>) {
    if step.is_multiple_of(25) {
        println!("{what}: step {step}, loss {:.4}", loss.clone().into_scalar::<f32>());
    }
}

/// What `check_with_peft.py` compares with: the dequantized weights without the adapter, ids, and logits with it.
fn write_check(model: &Transformer, folder: &Path, device: &Device) -> Result<()> {
    let ids = batch(1, 0, 4, LEN, device);
    let logits = model.forward(ids.clone());
    let mut weights = Weights::default();
    without_updates(model).visit(&mut weights);
    let mut tensors = weights.found;
    tensors.insert("logits".into(), Values::new(logits)?);
    tensors.insert("ids".into(), Values::new(ids.float())?);
    let path = folder.join("check.safetensors");
    safetensors::serialize_to_file(tensors, None, &path).with_context(|| format!("writing {}", path.display()))
}

/// The model with the adapters' updates taken out of its dequantized weights.
fn without_updates(model: &Transformer) -> Transformer {
    struct Zero(Vec<String>);

    impl burn::module::ModuleMapper for Zero {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.0.push(name.into());
        }

        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.pop();
        }

        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            match self.0.last().is_some_and(|name| name == "lora_b") {
                true => param.map(|factor| factor.zeros_like()),
                false => param,
            }
        }
    }

    model.valid().map(&mut Zero(Vec::new())).materialize()
}

/// Weights by PyTorch's names and in its layout.
#[derive(Default)]
struct Weights {
    path: Vec<String>,
    container: Vec<String>,
    found: BTreeMap<String, Values>,
}

impl ModuleVisitor for Weights {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.push(name.replace("gamma", "weight").replace("beta", "bias"));
        self.container.push(container_type.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
        self.container.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let linear = D == 2 && self.container.last().is_some_and(|container| container == "Struct:Linear");
        let value = if linear { param.val().swap_dims(0, 1) } else { param.val() };
        if let Ok(values) = Values::new(value) {
            self.found.insert(format!("base.{}", self.path.join(".")), values);
        }
    }
}

/// A tensor of f32 for a safetensors file.
struct Values {
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Values {
    fn new<const D: usize>(tensor: Tensor<D>) -> Result<Self> {
        let shape = tensor.dims().to_vec();
        let values = tensor.without_autodiff().try_into_vec_as::<f32>().map_err(|e| anyhow::anyhow!("{e}"))?;
        Ok(Self { shape, bytes: values.into_iter().flat_map(f32::to_le_bytes).collect() })
    }
}

impl View for Values {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        self.bytes.as_slice().into()
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}
