//! Translates a rule of .gitignore to a regular expression over bytes.
//!
//! Rules become one set of regular expressions. It matches in time linear in the name for any rules: they may come from
//! a peer, or from a file in a tree that another person wrote. Git's own matcher backtracks. The translation is haul's
//! own because the crates `ignore` and `globset` lack parts of git's rules: non-UTF-8 bytes, POSIX classes, escapes in
//! classes, and literal braces.

use std::fmt::Write as _;

/// What a match of a rule does.
#[derive(Debug, Clone, Copy)]
pub(super) struct Effect {
    pub(super) excludes: bool,
    pub(super) directories_only: bool,
}

/// Translates a rule to a regular expression over the whole name; `None` if it can match nothing.
pub(super) fn translate(rule: &[u8]) -> Option<(String, Effect)> {
    // Git's strings end at a NUL.
    let rule = rule.split(|&byte| byte == 0).next().unwrap_or_default();
    let (excludes, rule) = rule
        .strip_prefix(b"!")
        .map_or((true, rule), |rest| (false, rest));
    let (directories_only, rule) = rule
        .strip_suffix(b"/")
        .map_or((false, rule), |rest| (true, rest));
    let anchored = rule.contains(&b'/');
    let rule = if anchored {
        rule.strip_prefix(b"/").unwrap_or(rule)
    } else {
        rule
    };
    let mut expression = String::from(if anchored { r"\A" } else { r"\A(?:.*/)?" });
    if rule.is_empty() {
        return None;
    }
    push_glob(rule, anchored, &mut expression)?;
    expression.push_str(r"\z");
    Some((
        expression,
        Effect {
            excludes,
            directories_only,
        },
    ))
}

/// Appends the expression for a glob, with the semantics of git's wildmatch.c; `None` if it is malformed.
fn push_glob(rule: &[u8], across_directories: bool, expression: &mut String) -> Option<()> {
    // Git compares the part before the first wildcard separately, and the rest starts like a new rule.
    let literal = rule
        .iter()
        .position(|byte| b"*?[\\".contains(byte))
        .unwrap_or(rule.len());
    let mut at = 0;
    while let Some(&byte) = rule.get(at) {
        at += 1;
        match byte {
            b'?' => expression.push_str("[^/]"),
            b'*' => {
                let begins = at - 1 == literal || rule[at - 2] == b'/';
                let stars = rule[at..].iter().take_while(|&&byte| byte == b'*').count();
                at += stars;
                let whole = across_directories && stars > 0 && begins;
                match &rule[at..] {
                    [] if whole => expression.push_str(".*"),
                    [b'/', ..] if whole => {
                        at += 1;
                        expression.push_str("(?:.*/)?");
                    }
                    [b'\\', b'/', ..] if whole => expression.push_str(".*"),
                    _ => expression.push_str("[^/]*"),
                }
            }
            b'[' => {
                let (class, length) = class(&rule[at..])?;
                at += length;
                expression.push_str(&class);
            }
            b'\\' => {
                push_byte(*rule.get(at)?, expression);
                at += 1;
            }
            byte => push_byte(byte, expression),
        }
    }
    Some(())
}

fn push_byte(byte: u8, expression: &mut String) {
    // Writing to a string cannot fail.
    let _ = write!(expression, r"\x{byte:02x}");
}

/// Translates a class, given the text after its `[`; returns the expression, and the length with its `]`.
fn class(rule: &[u8]) -> Option<(String, usize)> {
    let mut set = [false; 256];
    let negated = matches!(rule.first()?, b'!' | b'^');
    let mut at = usize::from(negated);
    // The byte that a range may begin with.
    let mut previous = None;
    loop {
        let byte = *rule.get(at)?;
        let named =
            (byte == b'[' && rule.get(at + 1) == Some(&b':')).then(|| posix_class(&rule[at + 2..]));
        previous = match (byte, previous, named) {
            (b'\\', ..) => {
                at += 1;
                let quoted = *rule.get(at)?;
                set[usize::from(quoted)] = true;
                Some(quoted)
            }
            (b'-', Some(first), _) if rule.get(at + 1).is_some_and(|&next| next != b']') => {
                at += if rule[at + 1] == b'\\' { 2 } else { 1 };
                let last = *rule.get(at)?;
                set.iter_mut()
                    .take(usize::from(last) + 1)
                    .skip(usize::from(first))
                    .for_each(|is| *is = true);
                None
            }
            (_, _, Some(Posix::Class(is, length))) => {
                (0..=u8::MAX)
                    .filter(is)
                    .for_each(|byte| set[usize::from(byte)] = true);
                at += 1 + length;
                None
            }
            (_, _, Some(Posix::Malformed)) => return None,
            (byte, ..) => {
                set[usize::from(byte)] = true;
                Some(byte)
            }
        };
        at += 1;
        // A `]` that comes first is literal.
        if *rule.get(at)? == b']' {
            break;
        }
    }
    let matches_byte = |byte: u8| byte != b'/' && set[usize::from(byte)] != negated;
    let mut class = String::from("[");
    let mut bytes = (0..=u8::MAX).filter(|&byte| matches_byte(byte)).peekable();
    bytes.peek()?;
    while let Some(first) = bytes.next() {
        let mut last = first;
        while let Some(next) = bytes.next_if(|&next| u16::from(next) == u16::from(last) + 1) {
            last = next;
        }
        push_byte(first, &mut class);
        class.push('-');
        push_byte(last, &mut class);
    }
    class.push(']');
    Some((class, at + 1))
}

/// The result of parsing the text after a `[:` in a class.
enum Posix {
    /// The bytes of the class, and the length of the text with its `:]`.
    Class(fn(&u8) -> bool, usize),
    /// Not a class, but literal bytes.
    Literal,
    /// An unknown name or a missing end; then the rule matches nothing.
    Malformed,
}

/// Parses POSIX classes as git does: ASCII only, and white space without vertical tab and form feed.
fn posix_class(rule: &[u8]) -> Posix {
    let Some(end) = rule.iter().position(|&byte| byte == b']') else {
        return Posix::Malformed;
    };
    let Some(name) = rule[..end].strip_suffix(b":") else {
        return Posix::Literal;
    };
    let is: fn(&u8) -> bool = match name {
        b"alnum" => u8::is_ascii_alphanumeric,
        b"alpha" => u8::is_ascii_alphabetic,
        b"blank" => |byte| matches!(byte, b' ' | b'\t'),
        b"cntrl" => u8::is_ascii_control,
        b"digit" => u8::is_ascii_digit,
        b"graph" => u8::is_ascii_graphic,
        b"lower" => u8::is_ascii_lowercase,
        b"print" => |byte| matches!(byte, 0x20..=0x7e),
        b"punct" => u8::is_ascii_punctuation,
        b"space" => |byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r'),
        b"upper" => u8::is_ascii_uppercase,
        b"xdigit" => u8::is_ascii_hexdigit,
        _ => return Posix::Malformed,
    };
    Posix::Class(is, end + 1)
}
