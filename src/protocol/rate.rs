//! Rates as users write them, in bits or bytes a second.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

/// Error message for a text that is not a rate.
const ACCEPTED: &str =
    "write a rate in bits (20M, 20Mbit/s, 500k) or bytes (2.5MB/s, 500kB/s, 2MiB/s) a second";
/// Prefixes in ascending order. Each is 1,000 times the one before, or 1,024 times if an `i` follows.
const PREFIXES: &str = "kmgt";
/// Limit of digits in a number. No rate needs more, and no product of so many overflows.
const MAX_DIGITS: usize = 18;

/// A limit of the sending rate, in bytes a second.
///
/// In text, `b` and `bit` are bits and a capital `B` is bytes. A prefix alone (`20M`) means bits. `k`, `M`, `G` and `T`, in any
/// case, are powers of 1,000; `Ki`, `Mi`, `Gi` and `Ti` are powers of 1,024. A trailing `/s` or `ps` changes nothing. A number
/// without a unit is refused, because it would be KiB/s for rsync and kbit/s for scp.
///
/// ```
/// use haul::Rate;
/// let bytes = |text: &str| text.parse().map(Rate::bytes);
/// assert_eq!(bytes("20M"), bytes("2.5MB/s"));
/// assert_eq!(bytes("20mbps"), Ok(2_500_000));
/// assert_eq!(bytes("2MiB/s"), Ok(2 << 20));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rate(NonZeroU64);

/// Why a text is not a [`Rate`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadRate(String);

impl Rate {
    /// The lowest rate in bytes a second: 8 kbit/s. Below it a single packet takes seconds, and the peer may time out.
    pub const MIN: u64 = 1_000;
    /// The highest rate in bytes a second: 8 Tbit/s. No machine needs a limit above it.
    pub const MAX: u64 = 1_000_000_000_000;

    /// Makes a rate from bytes a second; `None` outside of [`MIN`](Self::MIN) to [`MAX`](Self::MAX).
    pub fn from_bytes(bytes: u64) -> Option<Self> {
        if (Self::MIN..=Self::MAX).contains(&bytes) {
            NonZeroU64::new(bytes).map(Self)
        } else {
            None
        }
    }

    /// Bytes a second.
    pub fn bytes(self) -> u64 {
        self.0.get()
    }
}

impl FromStr for Rate {
    type Err = BadRate;

    fn from_str(text: &str) -> Result<Self, BadRate> {
        let text = text.trim();
        let end = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let number = &text[..end];
        let unit = text[end..].trim_start();
        let (digits, scale) = decimal(number).ok_or_else(|| BadRate(ACCEPTED.into()))?;
        if unit.is_empty() {
            return Err(BadRate(format!(
                "{number} has no unit: {number}k is kbit/s (as scp's -l), {number}KiB is KiB/s (as rsync's --bwlimit)"
            )));
        }
        let (multiplier, divisor) = multipliers(unit).ok_or_else(|| BadRate(ACCEPTED.into()))?;
        let bytes = digits * u128::from(multiplier) / (scale * u128::from(divisor));
        match u64::try_from(bytes).ok().and_then(Self::from_bytes) {
            Some(rate) => Ok(rate),
            None if bytes < u128::from(Self::MIN) => Err(BadRate(
                "the lowest rate is 8 kbit/s (1 kB/s); write that or more".into(),
            )),
            None => Err(BadRate(
                "the highest rate is 8 Tbit/s (1 TB/s); for no limit, leave it out".into(),
            )),
        }
    }
}

/// A decimal number as an integer and the power of ten to divide it by.
fn decimal(number: &str) -> Option<(u128, u128)> {
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    let digits = whole.len() + part.len();
    if digits == 0 || digits > MAX_DIGITS || part.contains('.') {
        return None;
    }
    Some((
        format!("{whole}{part}").parse().ok()?,
        10_u128.pow(part.len() as u32),
    ))
}

/// The multiplier and divisor that turn a number with this unit into bytes.
fn multipliers(unit: &str) -> Option<(u64, u64)> {
    let place = unit
        .chars()
        .next()
        .and_then(|first| PREFIXES.find(first.to_ascii_lowercase()));
    let (power, rest) = place.map_or((0, unit), |place| (place as u32 + 1, &unit[1..]));
    let binary = rest.strip_prefix(['i', 'I']).filter(|_| power > 0);
    let rest = binary.unwrap_or(rest);
    let multiplier = if binary.is_some() {
        1_024_u64.pow(power)
    } else {
        1_000_u64.pow(power)
    };
    let each = ["/s", "/S", "ps", "PS"]
        .iter()
        .find_map(|each| rest.strip_suffix(each));
    let bits = match each.unwrap_or(rest) {
        "B" => false,
        "b" => true,
        bit if bit.eq_ignore_ascii_case("bit") || bit.eq_ignore_ascii_case("bits") => true,
        "" if power > 0 => true,
        _ => return None,
    };
    Some((multiplier, if bits { 8 } else { 1 }))
}

impl fmt::Display for Rate {
    /// Prints the rate in bits, as network links are specified: `20 Mbit/s`. The text parses back to the same rate.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = u128::from(self.bytes()) * 8;
        let (unit, name) = match bits {
            0..1_000_000 => (1_000, "kbit/s"),
            1_000_000..1_000_000_000 => (1_000_000, "Mbit/s"),
            _ => (1_000_000_000, "Gbit/s"),
        };
        let part = format!("{:0width$}", bits % unit, width = unit.ilog10() as usize);
        match part.trim_end_matches('0') {
            "" => write!(f, "{} {name}", bits / unit),
            part => write!(f, "{}.{part} {name}", bits / unit),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(text: &str) -> Result<u64, String> {
        text.parse()
            .map(Rate::bytes)
            .map_err(|e: BadRate| e.to_string())
    }

    #[test]
    fn bits_and_bytes_are_distinguished() {
        for bits in [
            "20M",
            "20m",
            "20Mbit",
            "20Mbit/s",
            "20mbps",
            "20 Mb/s",
            "20MBIT/S",
            "0.02G",
            "20000k",
            "20000000b",
        ] {
            assert_eq!(bytes(bits), Ok(2_500_000), "{bits}");
        }
        for (text, expected) in [
            ("2.5MB/s", 2_500_000),
            ("2.5MB", 2_500_000),
            ("2.5MBps", 2_500_000),
            ("500kB/s", 500_000),
            ("500KB/s", 500_000),
            ("1KiB", 1_024),
            ("2MiB/s", 2 << 20),
            ("1Gibit/s", 1 << 27),
            ("64Ki", 8 << 10),
            ("64kbit/s", 8_000),
            ("1000B/s", 1_000),
            ("1TB/s", Rate::MAX),
            (" 1.G ", 125_000_000),
        ] {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn an_invalid_rate_is_answered_with_the_right_form() {
        for text in [
            "",
            "M",
            "fast",
            "-5M",
            "+5M",
            "1e6b",
            "NaN",
            "inf",
            "infM",
            "1.2.3M",
            ".",
            ".M",
            "5MM",
            "5Mit",
            "5iB",
            "5M/h",
            "5 M B",
            "20M/",
            "0x10M",
            "５M",
            "1234567890123456789012345M",
            "5ö",
        ] {
            assert!(
                bytes(text).unwrap_err().contains("20Mbit/s"),
                "{text}: {:?}",
                bytes(text)
            );
        }
        let bare = bytes("1000").unwrap_err();
        assert!(
            bare.contains("1000k ") && bare.contains("1000KiB") && bare.contains("rsync"),
            "{bare}"
        );
        for low in ["0M", "0.0MB/s", "7k", "0.0000001G", "999B/s"] {
            assert!(
                bytes(low).unwrap_err().contains("8 kbit/s"),
                "{low}: {:?}",
                bytes(low)
            );
        }
        for high in ["1.1TB/s", "9Tbit", "999999999999999999TiB"] {
            assert!(
                bytes(high).unwrap_err().contains("8 Tbit/s"),
                "{high}: {:?}",
                bytes(high)
            );
        }
    }

    #[test]
    fn rates_are_shown_in_bits() {
        for (rate, shown) in [
            (2_500_000, "20 Mbit/s"),
            (1_001, "8.008 kbit/s"),
            (125_000, "1 Mbit/s"),
            (1_250_000_000, "10 Gbit/s"),
        ] {
            assert_eq!(Rate::from_bytes(rate).unwrap().to_string(), shown);
        }
    }

    proptest! {
        #[test]
        fn every_printed_rate_parses_back(bytes in Rate::MIN..=Rate::MAX) {
            let rate = Rate::from_bytes(bytes).unwrap();
            prop_assert_eq!(rate.to_string().parse(), Ok(rate));
            prop_assert_eq!(format!("{bytes}B/s").parse(), Ok(rate));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text: String, number in "[0-9.]{0,30}", unit in "[kKmMgGtTiIbBps/ ]{0,6}|.{0,4}") {
            for text in [text, format!("{number}{unit}")] {
                if let Ok(rate) = text.parse::<Rate>() {
                    prop_assert_eq!(rate.to_string().parse(), Ok(rate));
                }
            }
        }
    }
}
