//! Passes the events of an offering to the screen of the receiver that is served.

use std::sync::{Arc, Mutex, MutexGuard};

use haul::internal::error::lock::lock;
use haul::{Event, Observer};

use crate::cli::output::{self, Style};

/// An offering has one observer, and each receiver a screen of its own.
#[derive(Clone)]
pub(super) struct EventRouter {
    style: Style,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// The observer of the screen, while a receiver is served.
    screen: Option<Observer>,
    /// Events that were reported before the screen existed.
    early: Vec<Event>,
}

impl EventRouter {
    pub(super) fn new(style: Style) -> Self {
        Self {
            style,
            state: Arc::default(),
        }
    }

    /// Returns the observer for the offering. It prints what happens before a session.
    pub(super) fn observer(&self) -> Observer {
        let router = self.clone();
        Arc::new(move |event| match event {
            Event::Asked { address } => output::code::report_asked(router.style, address),
            Event::Left { address } => output::code::report_left(router.style, address),
            event => router.pass_on(event),
        })
    }

    fn pass_on(&self, event: Event) {
        let mut state = self.state();
        match &state.screen {
            Some(screen) => screen(event),
            None => state.early.push(event),
        }
    }

    /// Passes early and later events to a screen.
    pub(super) fn start(&self, screen: Observer) {
        let mut state = self.state();
        state.early.drain(..).for_each(|event| screen(event));
        state.screen = Some(screen);
    }

    /// Ends the screen. Events are kept again.
    pub(super) fn stop(&self) {
        *self.state() = State::default();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}
