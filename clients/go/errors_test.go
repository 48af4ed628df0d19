package keyturn_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/keyturn/keyturn/clients/go"
	keyturnv1 "github.com/keyturn/keyturn/clients/go/keyturn/v1"
)

var kinds = []error{
	keyturn.ErrInvalidArgument, keyturn.ErrUnauthenticated, keyturn.ErrPermissionDenied, keyturn.ErrNotFound,
	keyturn.ErrAlreadyExists, keyturn.ErrFailedPrecondition, keyturn.ErrResourceExhausted, keyturn.ErrUnavailable,
	keyturn.ErrDeadlineExceeded, keyturn.ErrInternal,
}

func TestEveryStatusHasItsKind(t *testing.T) {
	want := map[codes.Code][]error{
		codes.InvalidArgument:    {keyturn.ErrInvalidArgument},
		codes.Unauthenticated:    {keyturn.ErrUnauthenticated},
		codes.PermissionDenied:   {keyturn.ErrPermissionDenied},
		codes.NotFound:           {keyturn.ErrNotFound},
		codes.AlreadyExists:      {keyturn.ErrAlreadyExists},
		codes.FailedPrecondition: {keyturn.ErrFailedPrecondition},
		codes.ResourceExhausted:  {keyturn.ErrResourceExhausted},
		codes.Unavailable:        {keyturn.ErrUnavailable},
		codes.DeadlineExceeded:   {keyturn.ErrUnavailable, keyturn.ErrDeadlineExceeded},
		codes.Internal:           {keyturn.ErrInternal},
		codes.Unknown:            {keyturn.ErrInternal},
		codes.DataLoss:           {keyturn.ErrInternal},
		codes.Unimplemented:      {},
		codes.Canceled:           {},
		codes.OutOfRange:         {},
		codes.Aborted:            {},
	}
	for code, kindsOfIt := range want {
		err := error(&keyturn.Error{Code: code})
		for _, kind := range kinds {
			equal(t, code.String()+" is "+kind.Error(), errors.Is(err, kind), slices.Contains(kindsOfIt, kind))
		}
		equal(t, code.String()+" is context.DeadlineExceeded", errors.Is(err, context.DeadlineExceeded), code == codes.DeadlineExceeded)
		equal(t, code.String()+" is context.Canceled", errors.Is(err, context.Canceled), false)
	}
}

func TestADenialIsNoFault(t *testing.T) {
	err := error(&keyturn.DeniedError{Decision: &keyturn.Decision{}})
	for _, kind := range kinds {
		equal(t, kind.Error(), errors.Is(err, kind), false)
	}
	if _, ok := errors.AsType[*keyturn.Error](err); ok {
		t.Error("a DeniedError is an Error")
	}
}

func decideError(t *testing.T, failure error, trailer metadata.MD) *keyturn.Error {
	t.Helper()
	s := serve(t, &sidecar{onDecide: func(ctx context.Context, _ *keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error) {
		require(t, grpc.SetTrailer(ctx, trailer))
		return nil, failure
	}})
	_, err := s.open(t, keyturn.Options{Retries: keyturn.Retries{Attempts: 1}}).Decide(t.Context(), request())
	made, ok := errors.AsType[*keyturn.Error](err)
	if !ok {
		t.Fatalf("got %v, want an *Error", err)
	}
	return made
}

func TestAnErrorHasTheDetailsOfItsStatus(t *testing.T) {
	err := decideError(t, fault(codes.NotFound, "USER_NOT_FOUND",
		&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
			{Field: "user_id", Description: "Required."}, {Field: "model", Description: "Too long."},
		}},
		&errdetails.RetryInfo{RetryDelay: durationpb.New(1500 * time.Millisecond)},
		&errdetails.ResourceInfo{ResourceType: "user", ResourceName: "u1", Description: "gone"},
	), nil)
	equal(t, "code", err.Code, codes.NotFound)
	equal(t, "reason", err.Reason, "USER_NOT_FOUND")
	equal(t, "message", err.Message, "It is out of order.")
	equal(t, "retry after", err.RetryAfter, 1500*time.Millisecond)
	equal(t, "resource", *err.Resource, keyturn.Resource{Type: "user", Name: "u1", Description: "gone"})
	equal(t, "metadata", err.Metadata["error_id"], "e1")
	equal(t, "violations", len(err.FieldViolations), 2)
	equal(t, "text", err.Error(),
		"NOT_FOUND (USER_NOT_FOUND): It is out of order. [user_id: Required.; model: Too long.]")
}

func TestAnErrorWithoutDetailsSaysItsStatus(t *testing.T) {
	err := decideError(t, status.Error(codes.Unimplemented, "no such method"), nil)
	equal(t, "text", err.Error(), "UNIMPLEMENTED: no such method")
	equal(t, "retry after", err.RetryAfter, 0)
}

func TestAWaitBelowZeroIsNone(t *testing.T) {
	err := decideError(t, fault(codes.Unavailable, "X", &errdetails.RetryInfo{RetryDelay: durationpb.New(-time.Second)}), nil)
	equal(t, "retry after", err.RetryAfter, 0)
}

func TestAWaitOfAgesIsNotTurnedIntoNone(t *testing.T) {
	ages := &errdetails.RetryInfo{RetryDelay: &durationpb.Duration{Seconds: 315_576_000_000}}
	s := serve(t, &sidecar{onDecide: scripted[keyturnv1.DecideRequest](ticketAnswer, fault(codes.Unavailable, "X", ages))})
	_, err := s.open(t, keyturn.Options{}).Decide(t.Context(), request())
	equal(t, "unavailable", errors.Is(err, keyturn.ErrUnavailable), true)
	equal(t, "attempts", len(s.asked), 1)
}

func TestGarbledDetailsDoNotMaskTheStatus(t *testing.T) {
	garbledDetail := status.New(codes.NotFound, "gone").Proto()
	garbledDetail.Details = []*anypb.Any{
		{TypeUrl: "type.googleapis.com/google.rpc.ErrorInfo", Value: []byte("\xff\xff\xff")},
		{TypeUrl: "type.googleapis.com/unknown.Kind", Value: []byte("x")},
	}
	good, err := anypb.New(&errdetails.ErrorInfo{Reason: "KEPT"})
	require(t, err)
	garbledDetail.Details = append(garbledDetail.Details, good)
	made := decideError(t, status.FromProto(garbledDetail).Err(), nil)
	equal(t, "code", made.Code, codes.NotFound)
	equal(t, "reason", made.Reason, "KEPT")

	for what, details := range map[string]string{"no protobuf": "\xff\xff\xff", "of another code": "\x08\x03"} {
		made := decideError(t, status.Error(codes.NotFound, `"gone" \ away`), metadata.Pairs("grpc-status-details-bin", details))
		equal(t, what+": code", made.Code, codes.NotFound)
		equal(t, what+": message", made.Message, `"gone" \ away`)
	}
}

func TestItemsOfABatchHaveErrorsOfTheirOwn(t *testing.T) {
	info, err := anypb.New(&errdetails.ErrorInfo{Reason: "USER_NOT_FOUND"})
	require(t, err)
	failed := func(code int32) *keyturnv1.BatchDecideResult {
		return &keyturnv1.BatchDecideResult{Result: &keyturnv1.BatchDecideResult_Status{
			Status: &keyturnv1.Status{Code: code, Message: "gone", Details: []*anypb.Any{info}},
		}}
	}
	s := serve(t, &sidecar{onBatchDecide: func(context.Context, *keyturnv1.BatchDecideRequest) (*keyturnv1.BatchDecideResponse, error) {
		return &keyturnv1.BatchDecideResponse{Results: []*keyturnv1.BatchDecideResult{
			{Result: &keyturnv1.BatchDecideResult_Response{Response: keyAnswer()}}, failed(5), failed(99), failed(0), {},
		}}, nil
	}})
	asked := make([]keyturn.DecideRequest, 6) // one more than is answered
	for i := range asked {
		asked[i] = request()
	}
	results, err := s.open(t, keyturn.Options{}).DecideMany(t.Context(), asked)
	require(t, err)
	equal(t, "answers", len(results), 6)
	equal(t, "the first one's secret", results[0].Decision.Key.Secret.Reveal(), secretText)
	equal(t, "NOT_FOUND", errors.Is(results[1].Err, keyturn.ErrNotFound), true)
	equal(t, "its text", results[1].Err.Error(), "NOT_FOUND (USER_NOT_FOUND): gone")
	for i, err := range []error{results[2].Err, results[3].Err, results[4].Err, results[5].Err} {
		if !errors.Is(err, keyturn.ErrInternal) {
			t.Errorf("item %d: got %v, want ErrInternal", i+2, err)
		}
	}
}
