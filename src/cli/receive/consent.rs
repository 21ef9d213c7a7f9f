//! Shows an offer, and asks the user to accept it.

use std::path::Path;

use haul::Offer;
use haul::pairing::receive::{self, Met};

use crate::cli::output::offer::OfferedName;
use crate::cli::output::{self, Style, printable_path};

/// Where an accepted offer goes, and how the user is asked.
pub(super) struct Consent<'a> {
    /// The directory; `None` is standard output.
    pub(super) directory: Option<&'a Path>,
    pub(super) style: Style,
    /// Whether to accept without a question.
    pub(super) yes: bool,
}

impl Consent<'_> {
    /// Shows the offer, and returns whether it is accepted. With too little space, `yes` declines.
    pub(super) async fn ask(&self, met: &Met) -> bool {
        let offer = met.offer();
        let free = self.directory.and_then(receive::free_space);
        let names = OfferedName::look_up(met.names(), self.directory);
        let described = output::offer::describe(offer, &names);
        if self.style == Style::Json {
            output::offer::print_json(offer, &names, met.address(), free);
        } else if offer.text.is_none() {
            described.lines.iter().for_each(|line| output::note(line));
        }
        let enough_space = self.check_space(met, free);
        if self.yes {
            return enough_space;
        }
        // Enter alone accepts only if every risky name was shown.
        let accept_by_default = enough_space && !described.cut;
        let question = question(offer, accept_by_default);
        let asked = tokio::task::spawn_blocking(move || output::ask(&question)).await;
        match asked.ok().flatten().as_deref() {
            Some("y" | "Y" | "yes") => true,
            Some("") => accept_by_default,
            Some(_) => false,
            None => {
                output::note("");
                false
            }
        }
    }

    /// Whether the file system has room for what is missing, as far as it is known. Reports if it has not.
    fn check_space(&self, met: &Met, free: Option<u64>) -> bool {
        let Some((directory, free)) = self.directory.zip(free) else {
            return true;
        };
        let held = receive::held(directory, met.names());
        let missing = met.offer().bytes.saturating_sub(held);
        if free >= missing {
            return true;
        }
        output::note(&format!(
            "haul: not enough space in {}: {} would be received, {} are free",
            printable_path(directory),
            output::bytes(missing),
            output::bytes(free)
        ));
        false
    }
}

fn question(offer: &Offer, accept_by_default: bool) -> String {
    let from = &offer.from;
    let what = match offer.text {
        Some(_) => format!("A text from \"{from}\""),
        None => format!("From \"{from}\""),
    };
    let answers = if accept_by_default { "[Y/n]" } else { "[y/N]" };
    format!("{what} - accept? {answers}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_question_shows_the_default_answer() {
        let offer = Offer {
            from: "host".into(),
            ..Offer::default()
        };
        assert_eq!(question(&offer, true), "From \"host\" - accept? [Y/n]");
        let text = Offer {
            text: Some("hello".into()),
            ..offer
        };
        assert_eq!(
            question(&text, false),
            "A text from \"host\" - accept? [y/N]"
        );
    }
}
