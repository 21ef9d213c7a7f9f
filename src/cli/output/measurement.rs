//! Prints the progress and the results of `haul bench`.

use std::time::Duration;

use haul::bench::{Load, Measurement, Probe, RoundTrips};
use serde_json::{Value, json};

use super::print::{json_line, line};
use super::text::{bytes, milliseconds, three_digits};

/// The size that the expected duration is given for: 1 GiB, in bits.
const GIBIBIT: f64 = 8.0 * (1_u64 << 30) as f64;
/// A round-trip time that grows by less than this factor is reported as unchanged.
const GROWTH: f64 = 1.05;

/// Prints a measurement.
pub(crate) fn show_results(measured: &Measurement, json: bool) {
    if json {
        json_line(&object(measured));
    } else {
        lines(measured).iter().for_each(|text| line(text));
    }
}

/// Formats the status line of a running measurement.
pub(crate) fn progress_line(probe: Probe, arrived: u64, elapsed: Duration) -> String {
    let way = if probe == Probe::Down { "down" } else { "up" };
    let bits = arrived as f64 * 8.0 / elapsed.as_secs_f64().max(0.001);
    format!(
        "{way:<4}  {:.1} s  {}  {}",
        elapsed.as_secs_f64(),
        bytes(arrived),
        rate(bits)
    )
}

fn lines(measured: &Measurement) -> Vec<String> {
    let Measurement {
        idle,
        jitter,
        up,
        down,
    } = measured;
    let mut all = vec![format!(
        "idle  RTT {}, jitter {}",
        round_trips(idle),
        milliseconds(*jitter)
    )];
    for (way, load) in [("up", up), ("down", down)] {
        if let Some(load) = load {
            let rate = rate(load.rate);
            let trips = round_trips(&load.rtt);
            let loss = percent(load.loss());
            all.push(format!("{way:<4}  {rate}, RTT {trips}, loss {loss}"));
        }
    }
    all.push(expectation(measured));
    all
}

/// Summarises in one sentence what a copy over this path can expect.
fn expectation(measured: &Measurement) -> String {
    let loads = || measured.up.iter().chain(&measured.down);
    let rates = match (&measured.up, &measured.down) {
        (Some(up), Some(down)) => match (rate(up.rate), rate(down.rate)) {
            // If both figures have the same unit, only the first shows it.
            (up, down) if unit(&up) == unit(&down) => format!("{up} up and {} down", number(&down)),
            (up, down) => format!("{up} up and {down} down"),
        },
        (Some(up), None) => format!("{} up", rate(up.rate)),
        (None, Some(down)) => format!("{} down", rate(down.rate)),
        (None, None) => "nothing".into(),
    };
    let gibibyte = loads()
        .next()
        .map_or(f64::INFINITY, |load| GIBIBIT / load.rate);
    let loaded = loads()
        .map(|load| load.rtt.median)
        .max()
        .unwrap_or_default();
    let grown = match measured.idle.median {
        idle if loaded > idle.mul_f64(GROWTH) => {
            format!(
                "grows from {} to {} under load",
                number(&milliseconds(idle)),
                milliseconds(loaded)
            )
        }
        idle => format!("stays at {} under load", milliseconds(idle)),
    };
    let lost = match loads().map(Load::loss).fold(0.0, f64::max) {
        0.0 => "no packets are lost".into(),
        loss => format!("{} of packets are lost", percent(loss)),
    };
    format!(
        "Expect about {rates}: 1 GiB in {}; RTT {grown}; {lost}.",
        span(gibibyte)
    )
}

fn number(figure: &str) -> &str {
    figure.split_once(' ').map_or(figure, |(number, _)| number)
}

fn unit(figure: &str) -> &str {
    figure.split_once(' ').map_or("", |(_, unit)| unit)
}

fn round_trips(trips: &RoundTrips) -> String {
    format!(
        "{} (95 % within {})",
        milliseconds(trips.median),
        milliseconds(trips.p95)
    )
}

/// Formats a rate with three significant digits.
fn rate(bits: f64) -> String {
    match bits {
        0.0..999.5e3 => format!("{} kbit/s", three_digits(bits / 1e3)),
        0.0..999.5e6 => format!("{} Mbit/s", three_digits(bits / 1e6)),
        _ => format!("{} Gbit/s", three_digits(bits / 1e9)),
    }
}

fn percent(part: f64) -> String {
    if part > 0.0 && part < 0.0005 {
        "under 0.1 %".into()
    } else {
        format!("{:.1} %", part * 100.0)
    }
}

fn span(seconds: f64) -> String {
    match seconds {
        0.0..9.95 => format!("{seconds:.1} s"),
        0.0..119.5 => format!("{seconds:.0} s"),
        0.0..7_200.0 => format!("{:.0} min", seconds / 60.0),
        0.0..360_000.0 => format!("{:.0} h", seconds / 3600.0),
        _ => "days".into(),
    }
}

fn object(measured: &Measurement) -> Value {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let trips = |trips: &RoundTrips| json!({"count": trips.count, "min": ms(trips.min), "median": ms(trips.median), "p95": ms(trips.p95)});
    let load = |load: &Load| {
        json!({
            "bits_per_second": load.rate, "bytes": load.bytes, "seconds": load.time.as_secs_f64(),
            "rtt_ms": trips(&load.rtt), "packets_sent": load.packets_sent, "packets_lost": load.packets_lost,
            "loss": load.loss(),
        })
    };
    let mut object = json!({
        "type": "bench", "rtt_ms": trips(&measured.idle), "jitter_ms": ms(measured.jitter),
        "expect": expectation(measured),
    });
    for (way, measured) in [("up", &measured.up), ("down", &measured.down)] {
        if let Some(measured) = measured {
            object[way] = load(measured);
        }
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trips(ms: u64) -> RoundTrips {
        let time = Duration::from_millis(ms);
        RoundTrips {
            count: 20,
            min: time,
            median: time,
            p95: time,
        }
    }

    fn load(rate: f64, rtt: u64, packets_lost: u64) -> Load {
        let time = Duration::from_secs(5);
        Load {
            rate,
            bytes: (rate * 5.0 / 8.0) as u64,
            time,
            rtt: trips(rtt),
            packets_sent: 1000,
            packets_lost,
        }
    }

    fn measured(up: Option<Load>, down: Option<Load>) -> Measurement {
        Measurement {
            idle: trips(100),
            jitter: Duration::from_micros(250),
            up,
            down,
        }
    }

    #[test]
    fn one_sentence_summarises_rates_rtt_and_loss() {
        let both = measured(Some(load(92e6, 112, 10)), Some(load(88.04e6, 104, 0)));
        assert_eq!(
            expectation(&both),
            "Expect about 92.0 Mbit/s up and 88.0 down: 1 GiB in 93 s; RTT grows from 100 to 112 ms under load; \
             1.0 % of packets are lost."
        );
        assert_eq!(
            lines(&both)[0],
            "idle  RTT 100 ms (95 % within 100 ms), jitter 0.25 ms"
        );
        assert_eq!(
            lines(&both)[2],
            "down  88.0 Mbit/s, RTT 104 ms (95 % within 104 ms), loss 0.0 %"
        );
        let apart = expectation(&measured(
            Some(load(900e3, 101, 0)),
            Some(load(1.2e9, 100, 0)),
        ));
        assert!(
            apart.starts_with(
                "Expect about 900 kbit/s up and 1.20 Gbit/s down: 1 GiB in 3 h; RTT stays"
            ),
            "{apart}"
        );
        assert!(apart.ends_with("no packets are lost."), "{apart}");
        let down = expectation(&measured(None, Some(load(8.6e9, 100, 0))));
        assert!(
            down.starts_with("Expect about 8.60 Gbit/s down: 1 GiB in 1.0 s"),
            "{down}"
        );
    }

    #[test]
    fn extreme_figures_can_be_formatted() {
        let nothing = expectation(&measured(Some(load(0.0, 100, 1000)), None));
        assert!(
            nothing.contains("0.00 kbit/s up: 1 GiB in days;"),
            "{nothing}"
        );
        assert!(
            nothing.ends_with("100.0 % of packets are lost."),
            "{nothing}"
        );
        assert_eq!(
            (percent(0.0001), rate(999.6e3)),
            ("under 0.1 %".into(), "1.00 Mbit/s".into())
        );
    }

    #[test]
    fn json_keys_have_units_and_only_measured_directions() {
        let object = object(&measured(Some(load(8e6, 120, 10)), None));
        assert_eq!(
            (&object["up"]["bits_per_second"], &object["up"]["loss"]),
            (&8e6.into(), &0.01.into())
        );
        assert_eq!(
            (&object["rtt_ms"]["median"], &object["up"]["rtt_ms"]["p95"]),
            (&100.0.into(), &120.0.into())
        );
        assert_eq!(object.get("down"), None);
    }
}
