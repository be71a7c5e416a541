//! The turns that contestants take, and what becomes of one that fails and of a run that lost too much to the host.
//!
//! Who fails is taken out, with a line that says why, and the others go on. If that was ringvm, or what it is measured by, the
//! measurement as a whole has failed all the same once it is over; if no ringvm is left, it is over at once.
//!
//! Runs that lost too much CPU time to the host ([`steal`]) are repeated once the round is through, in the same order, those of all
//! contestants of that round together: so they still take turns, and what lasted a moment has passed. Of a run and its repeats the
//! one counts that lost least.

use std::fmt::Display;

use anyhow::{Error, Result};

use super::{Contender, Plan};
use crate::document::{Document, Removed};
use crate::{signals, steal};

/// Characters of a reason that is told in a line.
const LONGEST: usize = 400;

/// Who takes turns, and where.
pub(crate) struct Turns<'a, H> {
    /// The measurement.
    pub(crate) plan: &'a Plan,
    /// All who began it, whether they have failed since or not.
    pub(crate) contenders: &'a [Contender<H>],
    /// What is measured, for people, where that is not the same all the time.
    pub(crate) label: Option<&'a str>,
}

/// A run that counts so far, and what part of its CPU time it lost.
type Best<T> = Option<(f64, T)>;

impl<H: Display> Turns<'_, H> {
    /// Has everybody `run` once in each round, and `keep`s what came of it. A run says what part of its CPU time was lost, if that
    /// is known.
    ///
    /// # Errors
    /// Nobody is left, the user has interrupted it, or a result can't be kept.
    pub(crate) fn take<T>(
        &self,
        document: &mut Document,
        mut run: impl FnMut(&Contender<H>) -> Result<(T, Option<f64>)>,
        mut keep: impl FnMut(&mut Document, &Contender<H>, T) -> Result<()>,
    ) -> Result<()> {
        for round in 1..=self.plan.runs {
            let mut best: Vec<Best<T>> = self.contenders.iter().map(|_| None).collect();
            let outcome = self.round(round, document, &mut run, &mut best);
            // What was measured before something ended the round counts.
            for (contender, best) in self.contenders.iter().zip(best) {
                if let Some((_, result)) = best {
                    keep(document, contender, result)?;
                }
            }
            outcome?;
        }
        Ok(())
    }

    fn round<T>(
        &self,
        round: u32,
        document: &mut Document,
        run: &mut impl FnMut(&Contender<H>) -> Result<(T, Option<f64>)>,
        best: &mut [Best<T>],
    ) -> Result<()> {
        let plan = self.plan;
        // Another one begins each time: what a run leaves behind, dirty pages say, is not always the same one's to bear.
        let mut order: Vec<usize> =
            turn(round, best.len()).filter(|&index| self.is_in(document, &self.contenders[index])).collect();
        plan.progress.dec_length((best.len() - order.len()) as u64);
        for repeat in 0..=steal::MOST_REPEATS {
            let mut robbed = Vec::new();
            for index in order {
                let contender = &self.contenders[index];
                let name = contender.name();
                let again = if repeat == 0 { "" } else { ", again" };
                let label = self.label.map_or_else(String::new, |label| format!("{label}, "));
                plan.progress.set_message(format!("{label}run {round} of {}{again}: {name}", plan.runs));
                match run(contender) {
                    Ok((result, lost)) => {
                        let lost = lost.unwrap_or(0.0);
                        if best[index].is_none() {
                            plan.progress.inc(1);
                        }
                        if best[index].as_ref().is_none_or(|(least, _)| lost < *least) {
                            best[index] = Some((lost, result));
                        }
                        if lost > steal::LIMIT {
                            robbed.push(index);
                        }
                    }
                    Err(error) => {
                        if best[index].is_none() {
                            plan.progress.dec_length(1);
                        }
                        let context = format!("measuring {name}{}", self.place());
                        self.take_out(document, contender, error, context)?;
                    }
                }
                signals::check()?;
            }
            let Some(steal) = &mut document.steal else { break };
            let (members, done) = (best.len() as u64, plan.progress.position());
            if repeat == steal::MOST_REPEATS || !steal::may_repeat(robbed.len() as u64, members, done, steal.repeated) {
                break;
            }
            steal.repeated += robbed.len() as u64;
            order = robbed;
        }
        Ok(())
    }

    /// Has every VMM run once more while something is counted, and `keep`s what came of it.
    ///
    /// # Errors
    /// As for [`Self::take`].
    pub(crate) fn count<T>(
        &self,
        document: &mut Document,
        mut run: impl FnMut(&Contender<H>) -> Result<T>,
        mut keep: impl FnMut(&mut Document, &Contender<H>, T) -> Result<()>,
    ) -> Result<()> {
        let progress = &self.plan.progress;
        for contender in self.contenders.iter().filter(|contender| matches!(contender, Contender::Vmm(_))) {
            if !self.is_in(document, contender) {
                progress.dec_length(1);
                continue;
            }
            let name = contender.name();
            let label = self.label.map_or_else(String::new, |label| format!("{label}, "));
            progress.set_message(format!("{label}counting system calls: {name}"));
            match run(contender) {
                Ok(result) => {
                    keep(document, contender, result)?;
                    progress.inc(1);
                }
                Err(error) => {
                    progress.dec_length(1);
                    let context = format!("counting system calls of {name}{}", self.place());
                    self.take_out(document, contender, error, context)?;
                }
            }
            signals::check()?;
        }
        Ok(())
    }

    /// Takes out who has failed, and says so.
    ///
    /// # Errors
    /// Nobody is left for whom it would be worthwhile to go on; or it was no failure, but the user's wish.
    pub(crate) fn take_out(
        &self,
        document: &mut Document,
        contender: &Contender<H>,
        error: Error,
        context: String,
    ) -> Result<()> {
        if signals::interrupted().is_some() {
            return Err(error);
        }
        let (name, why) = (contender.name(), one_line(&error));
        self.plan.progress.suspend(|| eprintln!("ringvm-bench: taking out {name}{}: {why}", self.place()));
        document.removed.push(Removed { name, at: self.label.map(str::to_owned), why });
        let error = error.context(context);
        let is_left = |is: fn(&Contender<H>) -> bool| {
            self.contenders.iter().any(|contender| is(contender) && self.is_in(document, contender))
        };
        let goes_on = if self.contenders.iter().any(Contender::is_ours) {
            is_left(Contender::is_ours)
        } else {
            is_left(|_| true)
        };
        if !contender.is_rival() {
            // The first is told: those that follow may follow from it.
            self.plan.failure.borrow_mut().get_or_insert(error);
            if goes_on { Ok(()) } else { Err(Error::msg("nobody is left to be measured")) }
        } else if goes_on {
            Ok(())
        } else {
            Err(error)
        }
    }

    fn is_in(&self, document: &Document, contender: &Contender<H>) -> bool {
        !document.is_removed(&contender.name())
    }

    /// ` at LABEL`, for messages.
    fn place(&self) -> String {
        self.label.map_or_else(String::new, |label| format!(" at {label}"))
    }
}

/// The order of a round.
fn turn(round: u32, contenders: usize) -> impl Iterator<Item = usize> {
    (0..contenders).cycle().skip((round as usize - 1) % contenders.max(1)).take(contenders)
}

/// An error with what it quotes in one line, fit for a terminal. What it begins and ends with is kept, if it is long.
fn one_line(error: &Error) -> String {
    let text = format!("{error:#}");
    let mut line = String::new();
    for part in text.lines().map(str::trim).filter(|part| !part.is_empty()) {
        match line.chars().last() {
            None => {}
            Some(':') => line.push(' '),
            Some(_) => line += "; ",
        }
        line.extend(part.chars().map(|letter| if letter.is_control() { '\u{fffd}' } else { letter }));
    }
    let letters: Vec<char> = line.chars().collect();
    if letters.len() <= LONGEST {
        return line;
    }
    let (head, tail) = (&letters[..LONGEST / 2], &letters[letters.len() - LONGEST / 2..]);
    format!("{} … {}", head.iter().collect::<String>(), tail.iter().collect::<String>())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::path::PathBuf;

    use anyhow::bail;

    use super::*;
    use crate::cli::Output;
    use crate::document::tests::sample_document;
    use crate::plan::Size;
    use crate::vmm::{Contestant, Kind};

    /// A plain ring, ringvm in both places, and two others.
    fn contenders() -> Vec<Contender<&'static str>> {
        let ringvm = Contestant::new(Kind::Ringvm, PathBuf::from("/r"));
        let rival = |kind| Contender::Vmm(Contestant { rival: true, ..Contestant::new(kind, PathBuf::from("/v")) });
        let daemon = Contender::Vmm(ringvm.in_daemon());
        let host = Contender::Host("plain ring");
        vec![host, Contender::Vmm(ringvm), daemon, rival(Kind::Qemu), rival(Kind::Firecracker)]
    }

    /// What was run, what counted, and how it ended.
    struct Played {
        ran: Vec<String>,
        kept: Vec<String>,
        document: Document,
        outcome: Result<()>,
        progress: (u64, u64),
    }

    /// Plays rounds, in which `act` says what part of its time a run loses, by its name and the runs before it; or that it fails.
    fn play(runs: u32, act: impl Fn(&str, usize) -> Result<f64>) -> Played {
        let contenders = contenders();
        let plan = Plan::new(Size::of(runs, &contenders, 1), None).unwrap();
        let (ran, kept) = (RefCell::new(Vec::new()), RefCell::new(Vec::new()));
        let mut document = sample_document();
        document.series.clear();
        document.steal.as_mut().unwrap().repeated = 0;
        let mut left = document.clone();
        let outcome = plan.finish(document, (&Output::default(), |_, _| Ok(())), |document| {
            let turns = Turns { plan: &plan, contenders: &contenders, label: Some("depth 1") };
            let outcome = turns.take(
                document,
                |contender| {
                    let (name, count) = (contender.name(), ran.borrow().len());
                    ran.borrow_mut().push(name.clone());
                    let lost = act(&name, count)?;
                    Ok((format!("{name} {lost}"), Some(lost)))
                },
                |_, _, result| {
                    kept.borrow_mut().push(result);
                    Ok(())
                },
            );
            left = document.clone();
            outcome
        });
        let progress = (plan.progress.position(), plan.progress.length().unwrap());
        Played { ran: ran.into_inner(), kept: kept.into_inner(), document: left, outcome, progress }
    }

    const ALL: [&str; 5] = ["plain ring", "ringvm", "ringvm, daemon", "qemu", "firecracker"];

    #[test]
    fn everybody_has_a_run_in_each_round_and_begins_one() {
        let rounds: Vec<Vec<_>> = (1..=4).map(|round| turn(round, 3).collect()).collect();
        assert_eq!(rounds, [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]);
        let played = play(2, |_, _| Ok(0.0));
        assert_eq!(played.ran, [&ALL[..], &ALL[1..], &ALL[..1]].concat());
        assert_eq!((played.kept.len(), played.progress), (10, (10, 10)));
        assert!(played.outcome.is_ok() && played.document.removed.is_empty());
    }

    #[test]
    fn who_fails_is_taken_out_and_the_others_go_on() {
        let played = play(2, |name, _| match name {
            "qemu" => bail!("it ended\n  its stderr ends with:\n    no thanks"),
            _ => Ok(0.0),
        });
        assert!(played.outcome.is_ok(), "{:?}", played.outcome);
        assert_eq!(played.ran.iter().filter(|name| *name == "qemu").count(), 1);
        assert_eq!((played.kept.len(), played.progress), (8, (8, 8)));
        let why = "it ended; its stderr ends with: no thanks".to_owned();
        assert_eq!(played.document.removed, [Removed { name: "qemu".to_owned(), at: Some("depth 1".to_owned()), why }]);
    }

    #[test]
    fn if_ringvm_fails_the_others_go_on_but_the_measurement_has_failed() {
        for who in ["ringvm", "plain ring"] {
            // In the second round.
            let played = play(2, |name, count| if name == who && count > 4 { bail!("oh no") } else { Ok(0.0) });
            let error = format!("{:#}", played.outcome.unwrap_err());
            assert_eq!(error, format!("measuring {who} at depth 1: oh no"));
            assert!(played.document.is_removed(who), "{:?}", played.document.removed);
            assert_eq!((played.ran.len(), played.kept.len(), played.progress), (10, 9, (9, 9)));
        }
    }

    #[test]
    fn without_any_ringvm_it_is_over() {
        let played = play(3, |name, _| if name.starts_with("ringvm") { bail!("{name} died") } else { Ok(0.0) });
        assert_eq!(format!("{:#}", played.outcome.unwrap_err()), "measuring ringvm at depth 1: ringvm died");
        assert_eq!(
            (played.ran, played.kept),
            (ALL[..3].iter().map(|name| (*name).to_owned()).collect(), vec!["plain ring 0".to_owned()])
        );
        assert_eq!(played.document.removed.len(), 2);
    }

    #[test]
    fn robbed_runs_of_a_round_are_repeated_together_and_the_best_counts() {
        // In the first round ringvm loses less each time, its daemon at first only.
        let played = play(1, |name, count| {
            Ok(match (name, count) {
                ("ringvm", _) => 0.5 / (count + 1) as f64,
                ("ringvm, daemon", 0..5) => 0.9,
                _ => 0.01,
            })
        });
        assert_eq!(played.ran, [&ALL[..], &["ringvm", "ringvm, daemon"], &["ringvm"]].concat());
        assert_eq!(
            played.kept,
            ["plain ring 0.01", "ringvm 0.0625", "ringvm, daemon 0.01", "qemu 0.01", "firecracker 0.01"]
        );
        assert_eq!((played.document.steal.unwrap().repeated, played.progress), (3, (5, 5)));
    }

    #[test]
    fn a_host_that_always_steals_ends_the_measurement_too() {
        let played = play(20, |_, count| Ok(0.2 + count as f64 / 1e6));
        let repeated = played.document.steal.unwrap().repeated;
        assert_eq!((played.kept.len(), played.ran.len() as u64), (100, 100 + repeated));
        assert!((50..=55).contains(&repeated), "{repeated}");
        // Everybody was repeated as often.
        for name in ALL {
            assert_eq!(played.ran.iter().filter(|ran| *ran == name).count() as u64, 20 + repeated / 5);
        }
    }

    #[test]
    fn who_dies_in_a_repeat_keeps_the_run_before() {
        let played = play(1, |name, count| match (name, count) {
            ("qemu", 5..) => bail!("gone"),
            ("qemu", _) => Ok(0.3),
            _ => Ok(0.0),
        });
        assert!(played.outcome.is_ok() && played.kept.contains(&"qemu 0.3".to_owned()), "{:?}", played.kept);
        assert_eq!((played.document.removed.len(), played.progress), (1, (5, 5)));
    }

    #[test]
    fn reasons_are_told_in_a_line_of_bounded_length() {
        let error = Error::msg("a\u{1b}[31m\n\n  b:\n    c").context("first");
        assert_eq!(one_line(&error), "first: a\u{fffd}[31m; b: c");
        let long = one_line(&Error::msg(format!("begin{}end", "é".repeat(9_999))));
        assert_eq!(long.chars().count(), LONGEST + 3);
        assert!(long.starts_with("begin") && long.ends_with("end"), "{long}");
    }
}
