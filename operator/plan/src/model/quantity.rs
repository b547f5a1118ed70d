//! Kubernetes quantities: `4Gi`, `500m`, `1.5e9`. Kept as written, so that what a user wrote is what comes back.

use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A Kubernetes quantity, as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quantity(String);

/// Why a text is not a quantity that can be used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// Not a number with a known suffix.
    #[error("is not a quantity; write a number with a suffix, such as 4Gi, 500M or 250m")]
    Malformed,
    /// Below zero.
    #[error("is negative")]
    Negative,
    /// More than 64 bits.
    #[error("is too large")]
    TooLarge,
}

/// A decimal number times a power of ten or two: `mantissa * 10^exponent * 1024^binary`.
struct Parsed {
    mantissa: u128,
    exponent: i32,
    binary: u32,
}

impl Quantity {
    /// The text as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The value as a whole number of bytes (or whatever the unit is), rounded up.
    pub fn whole(&self) -> Result<u64, QuantityError> {
        self.scaled(0)
    }

    /// The value in thousandths, rounded up: `250m` is 250, `2` is 2000.
    pub fn thousandths(&self) -> Result<u64, QuantityError> {
        self.scaled(3)
    }

    fn scaled(&self, power: i32) -> Result<u64, QuantityError> {
        let Parsed {
            mantissa,
            exponent,
            binary,
        } = parse(&self.0)?;
        let two = mantissa
            .checked_mul(1024_u128.checked_pow(binary).ok_or(QuantityError::TooLarge)?)
            .ok_or(QuantityError::TooLarge)?;
        let exponent = exponent + power;
        let ten = 10_u128.checked_pow(exponent.unsigned_abs());
        let value = match (exponent >= 0, ten) {
            (true, Some(ten)) => two.checked_mul(ten).ok_or(QuantityError::TooLarge)?,
            (true, None) if two == 0 => 0,
            (true, None) => return Err(QuantityError::TooLarge),
            (false, Some(ten)) => two.div_ceil(ten),
            (false, None) => u128::from(two != 0),
        };
        u64::try_from(value).map_err(|_| QuantityError::TooLarge)
    }
}

fn parse(text: &str) -> Result<Parsed, QuantityError> {
    if text.starts_with('-') {
        return Err(QuantityError::Negative);
    }
    let text = text.strip_prefix('+').unwrap_or(text);
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return Err(QuantityError::Malformed);
    }
    let mantissa = format!("{whole}{fraction}")
        .parse()
        .map_err(|_| QuantityError::TooLarge)?;
    let places = i32::try_from(fraction.len()).map_err(|_| QuantityError::TooLarge)?;
    let (exponent, binary) = match suffix {
        "n" => (-9, 0),
        "u" => (-6, 0),
        "m" => (-3, 0),
        "" => (0, 0),
        "k" => (3, 0),
        "M" => (6, 0),
        "G" => (9, 0),
        "T" => (12, 0),
        "P" => (15, 0),
        "E" => (18, 0),
        "Ki" => (0, 1),
        "Mi" => (0, 2),
        "Gi" => (0, 3),
        "Ti" => (0, 4),
        "Pi" => (0, 5),
        "Ei" => (0, 6),
        _ => (decimal_exponent(suffix)?, 0),
    };
    Ok(Parsed {
        mantissa,
        exponent: exponent - places,
        binary,
    })
}

/// `e9`, `E+3`, `e-2`.
fn decimal_exponent(suffix: &str) -> Result<i32, QuantityError> {
    let digits = suffix.strip_prefix(['e', 'E']).ok_or(QuantityError::Malformed)?;
    let exponent: i32 = digits.parse().map_err(|_| QuantityError::Malformed)?;
    if exponent.abs() > 30 {
        Err(QuantityError::TooLarge)
    } else {
        Ok(exponent)
    }
}

impl From<&str> for Quantity {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl From<u64> for Quantity {
    fn from(value: u64) -> Self {
        Self(value.to_string())
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for Quantity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl de::Visitor<'_> for Visitor {
            type Value = Quantity;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a quantity, such as 4Gi")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Quantity, E> {
                Ok(Quantity::from(text))
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Quantity, E> {
                Ok(Quantity::from(value))
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Quantity, E> {
                Ok(Quantity(value.to_string()))
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for Quantity {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Quantity".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "x-kubernetes-int-or-string": true,
            "anyOf": [{ "type": "integer" }, { "type": "string" }],
            "pattern": r"^\+?([0-9]+(\.[0-9]*)?|\.[0-9]+)(([KMGTPE]i)|[numkMGTPE]|([eE][+-]?[0-9]+))?$",
            "maxLength": 32,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_mean_what_kubernetes_means() {
        for (text, whole) in [
            ("0", 0),
            ("1Ki", 1024),
            ("1.5Gi", 3 << 29),
            ("143771Mi", 143_771 << 20),
            ("2G", 2_000_000_000),
            ("1e3", 1000),
            ("1.5E+3", 1500),
            (".5k", 500),
            ("250m", 1),
            ("1n", 1),
            ("+7", 7),
        ] {
            assert_eq!(Quantity::from(text).whole(), Ok(whole), "{text}");
        }
        assert_eq!(Quantity::from("250m").thousandths(), Ok(250));
        assert_eq!(Quantity::from("2").thousandths(), Ok(2000));
    }

    #[test]
    fn what_is_not_a_quantity_is_refused_without_a_panic() {
        for text in ["", "Gi", "4GB", "4 Gi", "four", "1.2.3", "e9", "1e", "1ee3", "."] {
            assert_eq!(
                Quantity::from(text).whole(),
                Err(QuantityError::Malformed),
                "{text}"
            );
        }
        for text in [
            "1e31",
            "99999999999999999999Ei",
            "18446744073709551616",
            &"9".repeat(60),
        ] {
            assert_eq!(
                Quantity::from(text).whole(),
                Err(QuantityError::TooLarge),
                "{text}"
            );
        }
        assert_eq!(Quantity::from("-1").whole(), Err(QuantityError::Negative));
    }
}
