//! A model that is to answer, as the flags say.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use burn_qlora::adapter_io::checkpoint::refuse_adapter;
use burn_qlora::paged_optim::free_memory;
use burn_qlora::qlora_models::{ConfigOptions, PagedCache};
use burn_qlora::qlora_serve::CacheSize;
use burn_qlora::qlora_train::Placed;
use burn_qlora::qlora_train::config::{BaseModelConfig, QuantizationConfig};
use burn_qlora::{Decoder, Device, LoadOptions, QuantType, TrainConfig, compute_dtype, select_device};

use crate::args::ModelArgs;
use crate::exit::UsageError;
use crate::hub;
use crate::output::say;
use crate::progress::LoadBar;
use crate::sources::NamedBase;

/// Of a GPU's free memory, what the cache takes when nothing is said: the rest is for a pass's activations and adapters.
const CACHE_SHARE: f64 = 0.8;

/// The cache where the free memory is not known, bytes.
const SMALL_CACHE: u64 = 512 << 20;

/// The cache for past tokens of an engine that answers many at once, when nothing is said of it. Ask when the weights are
/// on the device: it is a part of what they leave.
pub fn default_cache(device: &Device) -> CacheSize {
    let of_free = free_memory(device).map(|(free, _)| (free as f64 * CACHE_SHARE) as u64);
    CacheSize::Bytes(of_free.unwrap_or(SMALL_CACHE))
}

/// The cache for this many tokens, or for as many as [`default_cache`] has room for.
pub fn cache_for(model: &Decoder, tokens: usize) -> CacheSize {
    let token_bytes = PagedCache::token_bytes(model.config(), model.dtype()) as u64;
    match default_cache(model.device()) {
        CacheSize::Bytes(bytes) if bytes / token_bytes.max(1) < tokens as u64 => CacheSize::Bytes(bytes),
        _ => CacheSize::Tokens(tokens),
    }
}

/// The name of the base: the one of the flags, or else the one that an adapter gives.
pub fn base_name<'a>(args: &'a ModelArgs, named: &'a NamedBase) -> Result<&'a str> {
    let name = args.model.as_deref().or(named.name.as_deref()).filter(|name| !name.is_empty());
    Ok(name.ok_or_else(|| UsageError("no base model is named, by --model or by an adapter: give --model".into()))?)
}

/// The base's folder. A base that is another than the adapter's is told.
pub fn base_dir(args: &ModelArgs, name: &str, named: &NamedBase) -> Result<PathBuf> {
    let dir = hub::resolve(name, named.revision(name, args.revision.as_deref()));
    let dir = match args.model {
        Some(_) => dir?,
        None => dir.with_context(|| {
            format!("the adapter names {name} as its base, which is not found from here: --model says where it is")
        })?,
    };
    refuse_adapter(&dir)?;
    Ok(dir)
}

/// What the flags say of the device and the weights, checked before anything is read.
pub struct Placement {
    device: Device,
    options: LoadOptions,
    config: BaseModelConfig,
    quantization: QuantizationConfig,
}

impl Placement {
    /// Checks the flags and finds the device.
    pub fn new(args: &ModelArgs) -> Result<Self> {
        Self::over(args, TrainConfig::default())
    }

    /// The same over what a configuration says.
    pub fn over(args: &ModelArgs, mut config: TrainConfig) -> Result<Self> {
        // The keys mean what they mean in a configuration, and are checked as there.
        for (key, value) in [
            ("device", &args.device),
            ("quantization.quant_type", &args.quant_type),
            ("quantization.compute_dtype", &args.compute_dtype),
            ("model.residency", &args.residency),
            ("model.device_budget", &args.device_budget),
        ] {
            if let Some(value) = value {
                config.set(key, value)?;
            }
        }
        config.validate_residency()?;
        config.model.accept_keys.extend(args.accept_key.iter().cloned());
        let device = select_device(&config.device)?;
        let dtype = compute_dtype(config.quantization.compute_dtype, &device)?;
        let options = LoadOptions { quantization: config.quantization.quant_config(), dtype };
        Ok(Self { options, device, config: config.model, quantization: config.quantization })
    }

    /// How the base's linear layers are kept, by the configuration's name for it.
    pub fn quant_type(&self) -> &'static str {
        match self.options.quantization.map(|config| config.quant_type) {
            None => "none",
            Some(QuantType::Nf4) => "nf4",
            Some(QuantType::Fp4) => "fp4",
        }
    }

    /// How the base's `config.json` is read.
    pub fn config_options(&self) -> ConfigOptions {
        self.config.config_options()
    }

    /// Loads the base.
    pub fn load(self, dir: &Path) -> Result<Decoder> {
        let Self { device, options, config, quantization } = self;
        let base = quantization.base_config(dir, &config.config_options())?;
        let (streams, _) = Placed::to_answer(&config, &base, &options, &device).streams(&device, None)?;
        if let Some(streams) = &streams {
            let blocks = streams.placement.streamed();
            say!(
                "The weights of {blocks} blocks wait in the host's memory (--residency); each pass brings them over the bus."
            );
        }
        let mut bar = LoadBar::new();
        let model = Decoder::load_as(base, dir, options, streams, &device, &mut |progress| bar.update(progress))?;
        bar.finish();
        model.config().notes.iter().for_each(|note| say!("{note}"));
        Ok(model)
    }
}
