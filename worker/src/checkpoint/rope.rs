//! Which rotary embedding a config asks for.
//!
//! Two spellings exist: `rope_theta` beside `rope_scaling`, and transformers 5's `rope_parameters` that holds both.
//! A kind of scaling that the model code does not compute is refused by name, and so is any parameter it would not
//! read.

use super::{config::Limits, error::CheckpointError, json::Fields};

/// The rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// How frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched for long contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency is divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// Llama 3.1's rule: high frequencies stay, low ones are divided by `factor`, those between are blended.
    Llama3 {
        /// At least 1.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` stay. Above `low_freq_factor`.
        high_freq_factor: f64,
        /// The context length that the model was first trained with.
        original_max_position_embeddings: usize,
    },
}

const DEFAULT_THETA: f64 = 10_000.0; // what the architecture means where no theta is written, as in its first release
const TYPES: &str = "\"default\", \"linear\" or \"llama3\"";

/// Reads the rotary embedding out of a whole config.json.
pub(crate) fn parse(config: &Fields) -> Result<Rope, CheckpointError> {
    let top_theta = theta(config)?;
    let old = match config.object("rope_scaling")? {
        Some(fields) => Some(scaling(config, &fields)?),
        None => None,
    };
    let Some(new_fields) = config.object("rope_parameters")? else {
        return Ok(Rope {
            theta: top_theta.unwrap_or(DEFAULT_THETA),
            scaling: old.unwrap_or(RopeScaling::None),
        });
    };
    let new = scaling(config, &new_fields)?;
    if old.is_some_and(|old| old != new) {
        return Err(config.wrong(
            "rope_scaling",
            "the same scaling as rope_parameters, or only one of the two",
        ));
    }
    let inner_theta = theta(&new_fields)?;
    if let (Some(top), Some(inner)) = (top_theta, inner_theta)
        && top != inner
    {
        return Err(config.wrong(
            "rope_theta",
            format!("the same value as rope_parameters.rope_theta, {inner}"),
        ));
    }
    Ok(Rope {
        theta: inner_theta.or(top_theta).unwrap_or(DEFAULT_THETA),
        scaling: new,
    })
}

fn theta(fields: &Fields) -> Result<Option<f64>, CheckpointError> {
    fields.number("rope_theta", "a number above 1", |x| x > 1.0)
}

/// Reads `rope_scaling` or `rope_parameters`.
fn scaling(config: &Fields, fields: &Fields) -> Result<RopeScaling, CheckpointError> {
    let (new, old) = (fields.text("rope_type")?, fields.text("type")?);
    if let (Some(new), Some(old)) = (new, old)
        && new != old
    {
        return Err(fields.wrong("type", format!("the same as rope_type, {new:?}, or nothing")));
    }
    let factor = || fields.needed_number("factor", "a number of at least 1", |x| x >= 1.0);
    let (scaling, known): (_, &[&str]) = match new.or(old) {
        Some("default") => (RopeScaling::None, &[]),
        Some("linear") => (RopeScaling::Linear { factor: factor()? }, &["factor"]),
        Some("llama3") => (
            llama3(config, fields, factor()?)?,
            &["factor", "low_freq_factor", "high_freq_factor"],
        ),
        Some(_) => {
            let key = if new.is_some() { "rope_type" } else { "type" };
            return Err(fields.wrong_advised(key, TYPES, "no other kind of rope scaling is supported"));
        }
        None => return Err(fields.wrong("rope_type", TYPES)),
    };
    // No rope type but llama3 reads the original length; exporters write it all the same.
    const ALWAYS: [&str; 4] = [
        "rope_type",
        "type",
        "rope_theta",
        "original_max_position_embeddings",
    ];
    let is_neutral = |key: &str| match key {
        "partial_rotary_factor" => fields.get(key).and_then(serde_json::Value::as_f64) == Some(1.0),
        _ => fields.get(key).is_none() || ALWAYS.contains(&key) || known.contains(&key),
    };
    let stray = fields.keys().find(|key| !is_neutral(key));
    match stray {
        Some(key) => Err(fields.wrong_advised(key, "nothing", "this rope type has no such parameter")),
        None => Ok(scaling),
    }
}

fn llama3(config: &Fields, fields: &Fields, factor: f64) -> Result<RopeScaling, CheckpointError> {
    let positive = |key| fields.needed_number(key, "a number above 0", |x| x > 0.0);
    let low_freq_factor = positive("low_freq_factor")?;
    let high_freq_factor = positive("high_freq_factor")?;
    if high_freq_factor <= low_freq_factor {
        let expected = format!("a number above low_freq_factor, {low_freq_factor}");
        return Err(fields.wrong("high_freq_factor", expected));
    }
    const ORIGINAL: &str = "original_max_position_embeddings";
    let original_max_position_embeddings = match fields.size(ORIGINAL, Limits::POSITIONS)? {
        Some(n) => n,
        None => match config.size(ORIGINAL, Limits::POSITIONS)? {
            Some(n) => n,
            None => fields.needed_size(ORIGINAL, Limits::POSITIONS)?,
        },
    };
    Ok(RopeScaling::Llama3 {
        factor,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings,
    })
}
