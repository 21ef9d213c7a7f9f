use super::*;
use proptest::prelude::*;

fn target(text: &str) -> Option<(String, u16, String, bool)> {
    let target: Target = text.parse().ok()?;
    let Host::Address { name, port } = target.host else {
        return None;
    };
    Some((
        name,
        port,
        String::from_utf8_lossy(target.path.as_bytes()).into_owned(),
        target.into,
    ))
}

#[test]
fn the_path_is_literal() {
    let is =
        |host: &str, port, path: &str, into| Some((host.to_owned(), port, path.to_owned(), into));
    assert_eq!(
        target("haul://h/a b/%41?x#y@z:1"),
        is("h", 4433, "a b/%41?x#y@z:1", false)
    );
    assert_eq!(target("haul://h"), is("h", 4433, "", true));
    assert_eq!(target("haul://h:99/"), is("h", 99, "", true));
    assert_eq!(target("haul://h/a//b/./"), is("h", 4433, "a/b", true));
    assert_eq!(target("haul://[::1]:5/x"), is("::1", 5, "x", false));
    assert_eq!(
        target("haul://[fe80::1%eth0]/x"),
        is("fe80::1%eth0", 4433, "x", false)
    );
    for wrong in [
        "haul://",
        "haul:///x",
        "haul://h/../x",
        "haul://h:0/",
        "haul://h:99999/",
        "haul://h:/x",
        "haul://::1/x",
        "haul://[::1/x",
        "haul://[::1]x/",
        "haul://[::1]:/x",
        "haul://[]/x",
        "haul://h:+99/",
        "haul://user@h/x",
        "haul://a b/x",
        "http://h/x",
    ] {
        assert_eq!(target(wrong), None, "{wrong}");
    }
}

#[test]
fn errors_about_a_host_say_what_to_write() {
    let reason = |text: &str| text.parse::<Target>().unwrap_err().to_string();
    assert!(reason("haul://::1/x").contains("[::1]"));
    assert!(reason("haul://bob@h/x").contains("haul id"));
    assert!(reason("haul://h:http/x").contains("65535"));
    assert!(reason("haul://h:99999/x").contains("65535"));
    assert!(reason("haul://[::1/x").contains("not closed"));
    assert!(reason("haul://h/../x").contains("`..`"));
}

#[test]
fn suggested_targets_are_valid() {
    let said = |text: &str| Argument::parse(OsStr::new(text)).unwrap_err().to_string();
    assert!(
        said("bob@h:a/b").contains("haul://h/a/b, "),
        "{}",
        said("bob@h:a/b")
    );
    assert!(said("bob@h:/srv/a").contains("haul://h/srv/a, "));
    assert!(said("bob@h:").contains("haul://h/, "));
    assert!(said("bob@h:../a").contains(EXAMPLE));
    assert!(said("[::1]:a").contains(EXAMPLE));
    assert!(said("haul:/h/a").contains(EXAMPLE));
}

#[test]
fn a_colon_before_the_first_slash_means_a_remote_name() {
    let parse = |text: &str| Argument::parse(OsStr::new(text));
    assert_eq!(parse("./a:b").unwrap(), Argument::Local("./a:b".into()));
    assert_eq!(parse("d/a:b").unwrap(), Argument::Local("d/a:b".into()));
    assert!(matches!(parse("haul://h/x").unwrap(), Argument::Remote(_)));
    for (text, name, path, into, again) in [
        ("bob:", "bob", "", true, "bob:"),
        ("bob:a/b", "bob", "a/b", false, "bob:a/b"),
        (
            "office-nas:/a//b/",
            "office-nas",
            "a/b",
            true,
            "office-nas:a/b/",
        ),
    ] {
        let Argument::Remote(target) = parse(text).unwrap() else {
            panic!("{text}")
        };
        assert_eq!(target.host, Host::Peer(name.parse().unwrap()));
        assert_eq!(
            (target.path.as_bytes(), target.into),
            (path.as_bytes(), into)
        );
        assert_eq!(target.to_string(), again);
    }
    assert!(parse("bob:../a").unwrap_err().to_string().contains("`..`"));
    assert!(parse("-bob:a").is_err());
    assert!(
        parse("http://h/x")
            .unwrap_err()
            .to_string()
            .contains("haul://")
    );
    assert!(parse("").is_err());
}

#[test]
fn petnames_have_only_plain_characters() {
    for good in ["bob", "office-nas", "a.b_c", "7"] {
        assert_eq!(good.parse::<Petname>().unwrap().as_str(), good);
    }
    for bad in [
        "",
        "haul",
        "-bob",
        ".",
        "..",
        "a b",
        "a/b",
        "a:b",
        "b\u{f6}b",
        "a@b",
        &"x".repeat(65),
    ] {
        assert!(bad.parse::<Petname>().is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn no_argument_makes_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
        let _ = Argument::parse(OsStr::from_bytes(&bytes));
        let _ = Target::parse(OsStr::from_bytes(&[SCHEME, &bytes[..]].concat()));
    }

    #[test]
    fn a_printed_target_parses_back(host in r"[a-z0-9.-]{1,20}|\[[0-9a-f:]{1,20}(%[a-z0-9]{1,8})?\]", port in 1u16.., path in "(/[a-zA-Z0-9 %?#:@]{1,9}){0,5}/?") {
        let target: Target = format!("haul://{host}:{port}{path}").parse().unwrap();
        prop_assert_eq!(target.to_string().parse::<Target>().unwrap(), target);
    }
}
