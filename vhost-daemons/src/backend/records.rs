//! Messages about state that is kept for a successor or another process: the table of requests in flight, the log of
//! written pages, the device's state.

use std::os::fd::OwnedFd;

use ringvm_backends::device::End;
use ringvm_vhost_user::message::{Message, NO_FILE, inflight_body};
use vhost::vhost_user::message::{VhostUserInflight, VhostUserLog, VhostUserTransferDeviceState};

use super::{Answer, Backend, Refused, malformed, too_short};
use crate::dirty::{Logging, Mapped};
use crate::vring::{MAX_SIZE, Vring};
use crate::{descriptor, inflight};

impl Backend<'_> {
    pub(super) fn get_inflight_fd(&mut self, message: &Message) -> Result<Answer, Refused> {
        let (said, area) = inflight::make(&inflight_payload(message)?, self.rings.len() as u16, MAX_SIZE)
            .map_err(Refused::Inflight)?;
        let file = area.file().try_clone().map_err(Refused::Inflight)?;
        Ok(Answer::Reply(inflight_body(&said), Some(file.into())))
    }

    pub(super) fn set_inflight_fd(&mut self, message: &Message, file: Option<OwnedFd>) -> Result<Answer, Refused> {
        let file = file.ok_or_else(|| malformed("a table without a descriptor"))?;
        let said = inflight_payload(message)?;
        let taken = inflight::take(&said, file, self.rings.len() as u16, MAX_SIZE, &self.alarm);
        let taken = taken.map_err(Refused::Inflight)?;
        self.stop_all(End::Drained)?;
        self.inflight = Some(taken);
        self.settle()?;
        Ok(Answer::Done)
    }

    pub(super) fn set_log_fd(&mut self, file: Option<OwnedFd>) -> Result<Answer, Refused> {
        let file = file.ok_or_else(|| malformed("its descriptor is missing"))?;
        let event = descriptor::interrupt(file).map_err(Refused::Event)?;
        self.change_logging(|logging| logging.set_event(event))?;
        Ok(Answer::Done)
    }

    pub(super) fn set_log_base(&mut self, said: &VhostUserLog, file: Option<OwnedFd>) -> Result<Answer, Refused> {
        let file = file.ok_or_else(|| malformed("a log without a descriptor"))?;
        let base = Mapped::new(said, file, &self.alarm).map_err(Refused::Log)?;
        if self.logging.has_base() {
            // Some frontends send this with each pass over the memory. Rings keep running.
            self.logging.set_base(base);
        } else {
            self.change_logging(|logging| logging.set_base(base))?;
        }
        // The specification asks for a reply but not for its contents: some frontends take any, some only what they
        // have sent.
        Ok(Answer::value(said))
    }

    /// Changes how writes are logged, while nothing is written. Rings continue from their positions.
    pub(super) fn change_logging(&mut self, change: impl FnOnce(&mut Logging)) -> Result<(), Refused> {
        let was_on = self.logging.is_on();
        if was_on {
            self.stop_all(End::Drained)?;
        }
        change(&mut self.logging);
        if self.logging.is_on() && !was_on {
            self.stop_all(End::Drained)?;
        }
        self.settle()
    }

    pub(super) fn set_device_state_fd(
        &mut self,
        said: &VhostUserTransferDeviceState,
        file: Option<OwnedFd>,
    ) -> Result<Answer, Refused> {
        let begun = self.state.begin(said, file, self.device, self.rings.iter().any(Vring::runs));
        Ok(match begun {
            // No descriptor comes back, the received one is used. The bits below report an error.
            Ok(()) => Answer::number(NO_FILE),
            Err(error) => Answer::Refused(NO_FILE | 1, error.into()),
        })
    }

    pub(super) fn check_device_state(&mut self) -> Answer {
        let rings_run = self.rings.iter().any(Vring::runs);
        match self.state.end(self.device, rings_run, &self.wanted) {
            Ok(()) => Answer::number(0),
            Err(error) => Answer::Refused(1, error.into()),
        }
    }
}

fn inflight_payload(message: &Message) -> Result<VhostUserInflight, Refused> {
    message.parse_inflight().ok_or_else(|| too_short(message))
}
