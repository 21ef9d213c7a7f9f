//! Checks a plan against the ranges that were offered as held.

use crate::error::{Code, Reason, Result};
use crate::protocol::{Held, Plan, Range};

/// Checks that a plan and the ranges it omits from `held` make up the whole file (PROTOCOL.md, 4.5). Returns the
/// omitted ranges. If nothing is held, as for a small file, only holes may be omitted.
pub(super) fn kept_ranges(
    plan: &Plan,
    held: &[Held],
    size: u64,
) -> Result<Vec<std::ops::Range<u64>>, Reason> {
    let bad = |text| Reason::new(Code::Protocol, text);
    let mut planned: Vec<Range> = plan.ranges.iter().chain(plan.holes()).copied().collect();
    planned.sort_unstable_by_key(|range| range.offset);
    let mut kept = Vec::new();
    let mut next = 0;
    for range in planned {
        let end = range.offset.saturating_add(range.length);
        if end > size {
            return Err(bad("the plan extends beyond the end of the file"));
        }
        if range.offset < next {
            return Err(bad("ranges and holes of the plan overlap"));
        }
        kept.push(next..range.offset);
        next = end;
    }
    kept.push(next..size);
    kept.retain(|part| !part.is_empty());
    if kept.iter().all(|part| covers(held, part.start, part.end)) {
        Ok(kept)
    } else {
        Err(bad("the plan omits ranges that the receiver does not hold"))
    }
}

/// Returns whether adjacent held ranges cover a part of the file.
fn covers(held: &[Held], start: u64, end: u64) -> bool {
    let mut at = start;
    for held in held
        .iter()
        .skip_while(|h| h.range.offset + h.range.length <= start)
    {
        if held.range.offset > at {
            break;
        }
        at = held.range.offset + held.range.length;
        if at >= end {
            return true;
        }
    }
    false
}
