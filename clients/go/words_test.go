package keyturn_test

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/keyturn/keyturn/clients/go"
	keyturnv1 "github.com/keyturn/keyturn/clients/go/keyturn/v1"
)

func TestTheOutcomeOfAnHTTPAnswer(t *testing.T) {
	for _, each := range []struct {
		status    int
		errorCode string
		want      keyturn.Outcome
	}{
		{200, "", keyturn.OutcomeSuccess},
		{204, "insufficient_quota", keyturn.OutcomeSuccess},
		{299, "billing_error", keyturn.OutcomeSuccess},
		{401, "", keyturn.OutcomeAuthRejected},
		{403, "", keyturn.OutcomeAuthRejected},
		{402, "", keyturn.OutcomeProviderBilling},
		{429, "insufficient_quota", keyturn.OutcomeProviderBilling},
		{429, "billing_hard_limit_reached", keyturn.OutcomeProviderBilling},
		{429, "billing_not_active", keyturn.OutcomeProviderBilling},
		{429, "billing_error", keyturn.OutcomeProviderBilling},
		{400, "billing_error", keyturn.OutcomeProviderBilling},
		{401, "billing_error", keyturn.OutcomeProviderBilling},
		{408, "billing_error", keyturn.OutcomeProviderBilling},
		{429, "", keyturn.OutcomeRateLimited},
		{429, "rate_limit_exceeded", keyturn.OutcomeRateLimited},
		{400, "insufficient_quota", keyturn.OutcomeRefused},
		{408, "", keyturn.OutcomeTimeout},
		{504, "", keyturn.OutcomeTimeout},
		{504, "billing_error", keyturn.OutcomeTimeout},
		{400, "", keyturn.OutcomeRefused},
		{404, "", keyturn.OutcomeRefused},
		{499, "", keyturn.OutcomeRefused},
		{500, "billing_error", keyturn.OutcomeProviderError},
		{503, "", keyturn.OutcomeProviderError},
		{302, "", keyturn.OutcomeProviderError},
		{199, "", keyturn.OutcomeProviderError},
		{0, "", keyturn.OutcomeProviderError},
	} {
		equal(t, fmt.Sprintf("%d %q", each.status, each.errorCode), keyturn.OutcomeOf(each.status, each.errorCode), each.want)
	}
}

func TestEveryWordOfTheContractHasItsName(t *testing.T) {
	for prefix, each := range map[string]struct {
		contract protoreflect.EnumDescriptor
		word     func(int32) fmt.Stringer
		known    []fmt.Stringer
	}{
		"MODE_": {keyturnv1.Mode(0).Descriptor(), func(n int32) fmt.Stringer { return keyturn.Mode(n) }, []fmt.Stringer{
			keyturn.ModeUnspecified, keyturn.ModeInternalOnly, keyturn.ModeBYOKOnly, keyturn.ModeCreditFirst, keyturn.ModeBYOKFirst,
		}},
		"REASON_": {keyturnv1.Reason(0).Descriptor(), func(n int32) fmt.Stringer { return keyturn.Reason(n) }, []fmt.Stringer{
			keyturn.ReasonUnspecified, keyturn.ReasonBYOKFirstOwnKey, keyturn.ReasonBYOKFirstNoKey, keyturn.ReasonBYOKFirstKeyFailed,
			keyturn.ReasonCreditFirstCredits, keyturn.ReasonCreditFirstExhausted, keyturn.ReasonBYOKOnlyOwnKey,
			keyturn.ReasonBYOKDisabled, keyturn.ReasonTierNotEligible, keyturn.ReasonCallerConstraint, keyturn.ReasonDenied,
		}},
		"DENIAL_REASON_": {keyturnv1.DenialReason(0).Descriptor(), func(n int32) fmt.Stringer { return keyturn.DenialReason(n) }, []fmt.Stringer{
			keyturn.DenialReasonUnspecified, keyturn.DenialReasonNoKeyAndNoCredits, keyturn.DenialReasonBYOKRequired,
			keyturn.DenialReasonTierNotEligible, keyturn.DenialReasonKeyUnusable, keyturn.DenialReasonInsufficientCredits,
			keyturn.DenialReasonHoldsInFlight, keyturn.DenialReasonRateLimited, keyturn.DenialReasonProviderDisabled,
			keyturn.DenialReasonEncryptionNotConfigured,
		}},
		"CONSTRAINT_": {keyturnv1.Constraint(0).Descriptor(), func(n int32) fmt.Stringer { return keyturn.Constraint(n) }, []fmt.Stringer{
			keyturn.ConstraintUnspecified, keyturn.ConstraintAny, keyturn.ConstraintOwnKeyOnly, keyturn.ConstraintCreditsOnly,
		}},
		"OUTCOME_": {keyturnv1.Outcome(0).Descriptor(), func(n int32) fmt.Stringer { return keyturn.Outcome(n) }, []fmt.Stringer{
			keyturn.OutcomeUnspecified, keyturn.OutcomeSuccess, keyturn.OutcomeClientCancelled, keyturn.OutcomeNeverSent,
			keyturn.OutcomeAuthRejected, keyturn.OutcomeRateLimited, keyturn.OutcomeProviderBilling, keyturn.OutcomeProviderError,
			keyturn.OutcomeTimeout, keyturn.OutcomeRefused, keyturn.OutcomeUnknown,
		}},
		"COST_SOURCE_": {keyturnv1.CostSource(0).Descriptor(), func(n int32) fmt.Stringer { return keyturn.CostSource(n) }, []fmt.Stringer{
			keyturn.CostSourceUnspecified, keyturn.CostSourceReported, keyturn.CostSourcePriced, keyturn.CostSourceEstimated,
			keyturn.CostSourceNone,
		}},
		"DURABILITY_": {keyturnv1.Durability(0).Descriptor(), func(n int32) fmt.Stringer { return keyturn.Durability(n) }, []fmt.Stringer{
			keyturn.DurabilityUnspecified, keyturn.DurabilityDatabase, keyturn.DurabilitySpooled,
		}},
		"KEY_STATE_": {keyturnv1.KeyState(0).Descriptor(), func(n int32) fmt.Stringer { return keyturn.KeyState(n) }, []fmt.Stringer{
			keyturn.KeyStateUnspecified, keyturn.KeyStateUsable, keyturn.KeyStateUnverified, keyturn.KeyStateInactive,
			keyturn.KeyStateInvalid, keyturn.KeyStateCoolingDown, keyturn.KeyStateUnreadable, keyturn.KeyStateDeleted,
		}},
	} {
		values := each.contract.Values()
		equal(t, prefix+": words", len(each.known), values.Len())
		for i := range values.Len() {
			want := strings.TrimPrefix(string(values.Get(i).Name()), prefix)
			equal(t, prefix, each.word(int32(values.Get(i).Number())).String(), want)
			equal(t, prefix, each.known[i].String(), want)
		}
		equal(t, prefix, each.word(4711).String(), "UNRECOGNIZED_4711")
	}
}
