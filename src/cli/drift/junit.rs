//! The report in the form of JUnit: a case for each feature, and one for the data set.

use quick_xml::Writer;
use quick_xml::events::{BytesDecl, BytesText, Event};

use super::check::{Failure, Limit, Measure};
use super::report::Report;
use crate::cli::admin::table::plain;
use crate::drift::verdict::State;

pub(super) fn document(
    limits: &[Limit],
    report: &Report,
    failures: &[Failure],
) -> std::io::Result<Vec<u8>> {
    let whole = limits.iter().filter(|limit| !matches!(limit.measure, Measure::Score(_)));
    let cases: Vec<Option<usize>> =
        (0..report.features.len()).map(Some).chain(whole.take(1).map(|_| None)).collect();
    let failed = cases.iter().filter(|case| failures.iter().any(|f| f.feature == **case)).count();
    let insufficient =
        |number: usize| report.features[number].verdict.state == State::InsufficientData;
    let skipped = (0..report.features.len()).filter(|number| insufficient(*number)).count();
    let mut writer = Writer::new_with_indent(Vec::new(), b' ', 2);
    writer.write_event(Event::Decl(BytesDecl::new("1.0", Some("UTF-8"), None)))?;
    let suite = writer.create_element("testsuite").with_attributes([
        ("name", "drift"),
        ("tests", &cases.len().to_string()),
        ("failures", &failed.to_string()),
        ("skipped", &skipped.to_string()),
    ]);
    suite.write_inner_content(|writer| {
        for case in &cases {
            let name = case.map_or("data set".to_owned(), |at| report.features[at].feature.label());
            let of_case: Vec<&Failure> = failures.iter().filter(|f| f.feature == *case).collect();
            let element = writer.create_element("testcase");
            let name = plain(&name);
            let element =
                element.with_attributes([("classname", "drift"), ("name", name.as_str())]);
            if !of_case.is_empty() {
                element.write_inner_content(|writer| {
                    for failure in &of_case {
                        let told = plain(&report.told(failure));
                        let element = writer.create_element("failure");
                        let element = element.with_attribute(("message", told.as_str()));
                        element.write_text_content(BytesText::new(&told))?;
                    }
                    Ok(())
                })?;
            } else if case.is_some_and(insufficient) {
                element.write_inner_content(|writer| {
                    let reason = ("message", "too few rows");
                    writer.create_element("skipped").with_attribute(reason).write_empty()?;
                    Ok(())
                })?;
            } else {
                element.write_empty()?;
            }
        }
        Ok(())
    })?;
    let mut xml = writer.into_inner();
    xml.push(b'\n');
    Ok(xml)
}
