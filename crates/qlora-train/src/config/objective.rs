//! What a run learns from its rows: `train.objective` and `[preference]`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::validate::check;
use crate::error::TrainError;

/// One thing to learn. The formulas are those of [`crate::objective`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Term {
    /// To write the answers of rows; of two the preferred one.
    Sft,
    /// Direct preference optimization.
    Dpo,
    /// The same with a margin instead of a likelihood (SLiC).
    Hinge,
    /// The same without the bias of preferences that are wrong by a known part.
    Robust,
    /// Identity preference optimization.
    Ipo,
    /// Anchored preference optimization: preferred answers become likelier, the others less likely.
    ApoZero,
    /// The same for preferred answers that are worse than the model's own.
    ApoDown,
    /// Kahneman-Tversky optimization, of answers that are wanted or not.
    Kto,
    /// Odds ratio preference optimization.
    Orpo,
    /// Simple preference optimization.
    Simpo,
    /// Contrastive preference optimization.
    Cpo,
}

impl Term {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Sft,
        Self::Dpo,
        Self::Hinge,
        Self::Robust,
        Self::Ipo,
        Self::ApoZero,
        Self::ApoDown,
        Self::Kto,
        Self::Orpo,
        Self::Simpo,
        Self::Cpo,
    ];

    /// What it is called in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sft => "sft",
            Self::Dpo => "dpo",
            Self::Hinge => "hinge",
            Self::Robust => "robust",
            Self::Ipo => "ipo",
            Self::ApoZero => "apo_zero",
            Self::ApoDown => "apo_down",
            Self::Kto => "kto",
            Self::Orpo => "orpo",
            Self::Simpo => "simpo",
            Self::Cpo => "cpo",
        }
    }

    /// Whether it compares the model with a reference.
    pub fn has_reference(self) -> bool {
        !matches!(self, Self::Sft | Self::Orpo | Self::Simpo | Self::Cpo)
    }

    /// Whether it takes two answers of which one is preferred.
    pub fn takes_pairs(self) -> bool {
        !matches!(self, Self::Sft | Self::Kto)
    }

    /// The `beta` of its paper or, where that has several, of most that followed.
    fn beta(self) -> f64 {
        if self == Self::Simpo { 2.0 } else { 0.1 }
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// `train.objective`: one thing to learn, or several with their weights, such as `{ dpo = 1.0, sft = 0.2 }`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Objective {
    /// One.
    One(Term),
    /// Their weighted sum.
    Sum(BTreeMap<Term, f64>),
}

impl Default for Objective {
    fn default() -> Self {
        Self::One(Term::Sft)
    }
}

impl Objective {
    /// The terms with their weights.
    pub fn terms(&self) -> Vec<(Term, f64)> {
        match self {
            Self::One(term) => vec![(*term, 1.0)],
            Self::Sum(terms) => terms.iter().map(|(term, weight)| (*term, *weight)).collect(),
        }
    }

    /// Whether rows are learned as they are, without a comparison of answers.
    pub fn is_supervised(&self) -> bool {
        self.terms().iter().all(|(term, _)| *term == Term::Sft)
    }

    /// Whether a term takes part.
    pub fn has(&self, term: Term) -> bool {
        self.terms().iter().any(|(of_sum, _)| *of_sum == term)
    }

    /// Whether a term compares the model with a reference.
    pub fn has_reference(&self) -> bool {
        self.terms().iter().any(|(term, _)| term.has_reference())
    }

    /// The first term that takes two answers of which one is preferred.
    pub fn takes_pairs(&self) -> Option<Term> {
        self.terms().into_iter().map(|(term, _)| term).find(|term| term.takes_pairs())
    }

    pub(crate) fn is_default(&self) -> bool {
        self.is_supervised()
    }

    pub(super) fn validate(&self) -> Result<(), TrainError> {
        let terms = self.terms();
        let names = terms.iter().map(|(term, _)| term.name()).collect::<Vec<_>>().join(", ");
        check("train.objective", "{}", !terms.is_empty(), "must name something to learn, such as \"sft\" or \"dpo\"")?;
        for (_, weight) in &terms {
            let allowed = "must have weights above 0, each a finite number";
            check("train.objective", weight, *weight > 0.0 && weight.is_finite(), allowed)?;
        }
        let alone = "can't be summed: kto learns from answers that are judged one by one, the others from pairs";
        check("train.objective", names, !self.has(Term::Kto) || self.takes_pairs().is_none(), alone)
    }
}

impl fmt::Display for Objective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(term) => term.fmt(f),
            Self::Sum(terms) => {
                let terms: Vec<_> = terms.iter().map(|(term, weight)| format!("{weight} {term}")).collect();
                f.write_str(&terms.join(" + "))
            }
        }
    }
}

/// What the model is compared with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Reference {
    /// The model as training finds it: the base with a fresh adapter, or with that of `train.from_adapter`.
    #[default]
    Start,
    /// The base without an adapter.
    Base,
    /// The base with this adapter.
    Adapter(PathBuf),
}

impl From<String> for Reference {
    fn from(text: String) -> Self {
        match text.as_str() {
            "start" => Self::Start,
            "base" => Self::Base,
            other => Self::Adapter(other.strip_prefix("adapter:").unwrap_or(other).into()),
        }
    }
}

impl From<Reference> for String {
    fn from(reference: Reference) -> Self {
        match reference {
            Reference::Start => "start".into(),
            Reference::Base => "base".into(),
            Reference::Adapter(folder) => format!("adapter:{}", folder.display()),
        }
    }
}

/// `[preference]`: the settings of objectives that compare answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PreferenceConfig {
    /// How much a difference of log-probabilities counts; `None` is the objective's own: 0.1, and 2 for `simpo`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta: Option<f64>,
    /// What part of the preferences is taken to be wrong, in `dpo`, `robust`, `simpo` and `cpo`.
    pub label_smoothing: f64,
    /// `simpo`: what the reward of a preferred answer must exceed the other's by.
    pub simpo_gamma: f64,
    /// `cpo` and `simpo`: the weight of learning to write preferred answers beside the comparison.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpo_alpha: Option<f64>,
    /// `kto`: the weight of answers that are wanted.
    pub desirable_weight: f64,
    /// `kto`: the weight of answers that are not.
    pub undesirable_weight: f64,
    /// What the model is compared with: `start`, `base` or `adapter:FOLDER`.
    pub reference: Reference,
    /// Whether the reference's log-probabilities are computed for all rows ahead of the run, and kept on disk.
    pub precompute_reference: bool,
}

impl Default for PreferenceConfig {
    fn default() -> Self {
        Self {
            beta: None,
            label_smoothing: 0.0,
            simpo_gamma: 0.5,
            cpo_alpha: None,
            desirable_weight: 1.0,
            undesirable_weight: 1.0,
            reference: Reference::Start,
            precompute_reference: false,
        }
    }
}

impl PreferenceConfig {
    /// The beta of a term.
    pub fn beta_of(&self, term: Term) -> f64 {
        self.beta.unwrap_or_else(|| term.beta())
    }

    /// The weight of writing preferred answers in a term: 1 in `cpo`, 0 elsewhere, unless it is given.
    pub fn alpha_of(&self, term: Term) -> f64 {
        match term {
            Term::Cpo => self.cpo_alpha.unwrap_or(1.0),
            Term::Simpo => self.cpo_alpha.unwrap_or(0.0),
            _ => 0.0,
        }
    }

    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Checks the section, whose keys belong to objectives.
    pub(super) fn validate(&self, objective: &Objective) -> Result<(), TrainError> {
        let positive = |x: f64| x > 0.0 && x.is_finite();
        if let Some(beta) = self.beta {
            check("preference.beta", beta, positive(beta), "must be a finite number above 0")?;
        }
        let smoothing = self.label_smoothing;
        let in_range = (0.0..0.5).contains(&smoothing);
        check("preference.label_smoothing", smoothing, in_range, "must be from 0 to below 0.5")?;
        let default = Self::default();
        let uses = |terms: &[Term]| terms.iter().any(|term| objective.has(*term));
        let needs = |key: &str, value: String, is_default: bool, terms: &[Term]| {
            let names: Vec<_> = terms.iter().map(|term| term.name()).collect();
            let allowed =
                format!("belongs to train.objective = {}, and the objective is {objective}", names.join(" or "));
            check(key, value, is_default || uses(terms), &allowed)
        };
        needs(
            "preference.label_smoothing",
            smoothing.to_string(),
            smoothing == 0.0,
            &[Term::Dpo, Term::Robust, Term::Simpo, Term::Cpo],
        )?;
        let gamma = self.simpo_gamma;
        check(
            "preference.simpo_gamma",
            gamma,
            gamma >= 0.0 && gamma.is_finite(),
            "must be a finite number, 0 or more",
        )?;
        needs("preference.simpo_gamma", gamma.to_string(), gamma == default.simpo_gamma, &[Term::Simpo])?;
        if let Some(alpha) = self.cpo_alpha {
            check(
                "preference.cpo_alpha",
                alpha,
                alpha >= 0.0 && alpha.is_finite(),
                "must be a finite number, 0 or more",
            )?;
            needs("preference.cpo_alpha", alpha.to_string(), false, &[Term::Cpo, Term::Simpo])?;
        }
        for (key, weight) in [
            ("preference.desirable_weight", self.desirable_weight),
            ("preference.undesirable_weight", self.undesirable_weight),
        ] {
            check(key, weight, weight >= 0.0 && weight.is_finite(), "must be a finite number, 0 or more")?;
            needs(key, weight.to_string(), weight == 1.0, &[Term::Kto])?;
        }
        let said = self.reference != Reference::Start || self.precompute_reference;
        let allowed = format!("belongs to objectives that have a reference, and {objective} has none");
        check(
            "preference.reference",
            String::from(self.reference.clone()),
            !said || objective.has_reference(),
            &allowed,
        )?;
        let of_kto = "can't serve kto, which compares each prompt with other answers, too; leave it out";
        check("preference.precompute_reference", true, !self.precompute_reference || !objective.has(Term::Kto), of_kto)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TrainConfig;

    fn parsed(text: &str) -> TrainConfig {
        let text = format!("[model]\npath = \"m\"\n[data]\ntrain = \"r.jsonl\"\n{text}");
        TrainConfig::parse(&text, "run.toml").unwrap()
    }

    #[test]
    fn an_objective_is_a_name_or_weights() {
        let config = parsed("[train]\nobjective = \"apo_zero\"");
        assert_eq!(config.train.objective, Objective::One(Term::ApoZero));
        let config =
            parsed("[train]\nobjective = { dpo = 1, sft = 0.25 }\n[preference]\nreference = \"adapter:runs/a\"");
        assert_eq!(config.train.objective.terms(), [(Term::Sft, 0.25), (Term::Dpo, 1.0)]);
        assert_eq!(config.train.objective.to_string(), "0.25 sft + 1 dpo");
        assert_eq!(config.preference.reference, Reference::Adapter("runs/a".into()));
        config.validate().unwrap();
        assert!(Objective::default().is_supervised() && !config.train.objective.is_supervised());
        for term in Term::ALL {
            let named = parsed(&format!("[train]\nobjective = {:?}", term.name()));
            assert_eq!(named.train.objective, Objective::One(term));
        }
    }

    #[test]
    fn settings_belong_to_objectives() {
        for (text, words) in [
            ("[train]\nobjective = { dpo = 0 }", "train.objective"),
            ("[train]\nobjective = { dpo = 1, kto = 1 }", "one by one"),
            ("[train]\nobjective = \"dpo\"\n[preference]\nsimpo_gamma = 1.0", "belongs to train.objective = simpo"),
            ("[train]\nobjective = \"ipo\"\n[preference]\nlabel_smoothing = 0.1", "dpo or robust"),
            ("[train]\nobjective = \"dpo\"\n[preference]\nlabel_smoothing = 0.5", "below 0.5"),
            ("[train]\nobjective = \"orpo\"\n[preference]\nprecompute_reference = true", "orpo has none"),
            ("[train]\nobjective = \"kto\"\n[preference]\nprecompute_reference = true", "can't serve kto"),
            ("[preference]\nreference = \"base\"", "sft has none"),
        ] {
            let error = parsed(text).validate().unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
